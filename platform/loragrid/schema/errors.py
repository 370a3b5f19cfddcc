"""Errors in an experiment, which name file, key, value and what is allowed."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from types import UnionType
from typing import Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from loragrid.schema.fields import allowed_by
from loragrid.schema.foreign_names import Replacement, replacement_of

MISSING = object()
"""Marks the value of a missing key."""

MAX_SHOWN_CHARACTERS = 80

# Texts that YAML 1.1 reads as true, false or numbers. YAML 1.2 does not.
_SWITCHES = dict.fromkeys(("yes", "on", "y", "true"), "true") | dict.fromkeys(("no", "off", "n", "false"), "false")
_YAML_1_1_NUMBER = re.compile(
    r"[-+]?(?:[0-9]+(?::[0-5]?[0-9])+(?:\.[0-9]*)?|0b[01_]+|0x_*[0-9a-fA-F_]+|(?=.*_)[0-9][0-9_]*(?:\.[0-9_]*)?)"
)
_WITH_UNDERSCORES = re.compile(r"[-+]?[0-9_.]+")
_WITH_COMMA = re.compile(r"[-+]?[0-9]+(?:,[0-9]+)+(?:\.[0-9]*)?")
MAX_SHOWN_PROBLEMS = 40


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of an experiment.

    key: dotted path as in the YAML file, such as `methods.2.rank`; empty for the file as a whole.
    what: what is wrong with the value, as the end of a sentence.
    allowed: the accepted values; empty if `what` already names them.
    """

    key: str
    what: str
    value: object = MISSING
    allowed: str = ""

    def under(self, prefix: str) -> "Problem":
        """The same problem with its key below the section `prefix`."""
        return replace(self, key=".".join(part for part in (prefix, self.key) if part))

    def __str__(self) -> str:
        key = self.key if self.key.isprintable() else repr(self.key)
        value = "" if self.value is MISSING else show_value(self.value)
        text = ": ".join(part for part in (_shorten(key), value, self.what) if part)
        return f"{text}; allowed: {self.allowed}" if self.allowed else text


class ExperimentError(ValueError):
    """An experiment that cannot run as it is written; nothing has been started.

    Its text has one line per problem: `FILE: KEY: VALUE: what is wrong; allowed: ...`.
    """

    def __init__(self, problems: Sequence[Problem], source: str = "", overridden: Sequence[str] = ()) -> None:
        super().__init__(tuple(problems), source, tuple(overridden))
        self.problems = tuple(problems)
        self.source = source
        self.overridden = tuple(overridden)

    def __str__(self) -> str:
        lines = [self._line(problem) for problem in self.problems[:MAX_SHOWN_PROBLEMS]]
        more = len(self.problems) - len(lines)
        return "\n".join([*lines, f"and {more} more"] if more else lines)

    def _line(self, problem: Problem) -> str:
        # An overridden value is not in the file; the message must name --set too.
        from_override = any(problem.key == key or problem.key.startswith(f"{key}.") for key in self.overridden)
        source = f"{self.source} (--set)" if from_override else self.source
        return f"{source}: {problem}" if source else str(problem)

    def under(self, prefix: str) -> "ExperimentError":
        """The same error with its keys below the section `prefix`."""
        return ExperimentError([problem.under(prefix) for problem in self.problems], self.source, self.overridden)


def unknown(kind: str, word: object, known: Iterable[str], *, key: str, value: object = MISSING) -> Problem:
    """The problem of an unknown name, with the key that another program's name means, or the closest known name."""
    names = list(known)
    last = str(word).rpartition(".")[2]
    foreign = replacement_of(last)
    # A word of our own: another name here has it, or this method has no such setting.
    is_own = any(name.rpartition(".")[2] == last for name in names)
    is_own |= foreign == Replacement(f"methods.{last}")
    advice = did_you_mean(str(word), names) if foreign is None or is_own else foreign.words()
    return Problem(key=key, value=value, what=f"unknown {kind}{advice}", allowed=", ".join(names))


def problems_of(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """What pydantic found in a `root`, as problems, each once; `allowed` is the text of the field's `Allowed`."""
    problems: dict[tuple[str, str], Problem] = {}
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ExperimentError):
            found = [problem.under(_dotted(detail["loc"])) for problem in cause.problems]
        else:
            found = [_problem_of(detail["loc"], detail["type"], detail["input"], detail["msg"], root)]
        for problem in found:  # pydantic reports once per alternative of a union; keep the first
            problems.setdefault((problem.key, problem.what), problem)
    # If entries of a list are wrong, pydantic also reports the list as too short. Drop problems above others' keys.
    above = {parent for problem in problems.values() for parent in _parents(problem.key)}
    return [problem for problem in problems.values() if problem.key not in above]


def _parents(key: str) -> list[str]:
    """`a` and `a.b` for `a.b.c`."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _problem_of(loc: tuple[int | str, ...], kind: str, value: object, message: str, root: type[BaseModel]) -> Problem:
    section, path = root, [*loc]
    while len(path) > 1 and (inner := _section_of(section, path[0])):
        section, path = inner, path[1:]
    name = str(path[0])
    if kind == "extra_forbidden":
        return unknown("key", name, section.model_fields, key=_dotted(loc), value=value)
    field = section.model_fields[name]
    inner = _section_of(section, name)
    allowed = f"a mapping with the keys {', '.join(inner.model_fields)}" if inner else allowed_by(field.metadata)
    if name != "columns":  # for a union, pydantic appends the alternative to the location
        loc = loc[: len(loc) - len(path) + 1]
    if kind == "missing":
        return Problem(key=_dotted(loc), what="is missing", allowed=allowed)
    what = what_is_wrong(value, allowed) if allowed else message
    return Problem(key=_dotted(loc), value=value, what=what, allowed=allowed)


def _section_of(section: type[BaseModel], field_name: int | str) -> type[BaseModel] | None:
    field = section.model_fields.get(str(field_name))
    annotation = field.annotation if field else None
    # An optional section is a union with None.
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for alternative in alternatives:
        if isinstance(alternative, type) and issubclass(alternative, BaseModel):
            return alternative
    return None


def what_is_wrong(value: object, allowed: str) -> str:
    """Why a value is refused; recognises common mistakes."""
    if isinstance(value, list | tuple) and "list" not in allowed:
        return "a list is an axis only inside a grid: block"
    if isinstance(value, bool) and "number" in allowed and "true" not in allowed:
        return "is true or false, not a number"
    if isinstance(value, str) and "number" in allowed and (mistake := _mistaken_number(value)):
        return mistake
    if isinstance(value, str) and "true" in allowed and (switch := _SWITCHES.get(value.lower())):
        return f"is text, and YAML 1.2 has only true and false: write {switch}, without quotes"
    if isinstance(value, float) and "whole number" in allowed and math.isfinite(value):
        return f"is not a whole number: write {int(value)}" if value.is_integer() else "is not a whole number"
    if allowed.startswith("text") and isinstance(value, int | float | date):
        return "is not text: put it in quotes"
    return "is not allowed"


def _mistaken_number(text: str) -> str:
    """Why a text that looks like a number is none, and how to write the number; empty for other texts."""
    text = text.strip()
    if _YAML_1_1_NUMBER.fullmatch(text):
        advice = f": write {text.replace('_', '')}" if _WITH_UNDERSCORES.fullmatch(text) else ""
        return f"is text, because such numbers exist only in YAML 1.1 and this is YAML 1.2{advice}"
    if _WITH_COMMA.fullmatch(text):
        return "is text, because a number has no comma: write a point, or leave the comma out"
    try:
        float(text)
    except ValueError:
        return ""
    return "is text, not a number: leave out the quotes"


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'rank'?` if a known name resembles the word, otherwise empty."""
    # Compares last parts only: `lr` must match `training.lr`, and a shared section is not a match.
    names = {name.rpartition(".")[2]: name for name in reversed(list(known))}
    matches = difflib.get_close_matches(word.rpartition(".")[2][:MAX_SHOWN_CHARACTERS], names, n=1, cutoff=0.6)
    return f", did you mean '{names[matches[0]]}'?" if matches else ""


def is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which JSON and YAML can write (`\\ud800`)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def show_value(value: object) -> str:
    """The value as one short line in YAML's spelling (`null`, `true`), with control characters escaped."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = _as_python_shows(value)
    return _shorten(text if text.isprintable() else ascii(text))


def _as_python_shows(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python refuses to convert an integer of more than 4,300 digits
        return f"a value of type {type(value).__name__} that is too large to show"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…"
