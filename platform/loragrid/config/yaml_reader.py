"""Reads the YAML of an experiment file: plain data without repeated keys and without aliases."""

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from loragrid.schema.errors import ExperimentError, Problem, is_unicode

MAX_FILE_BYTES = 256 * 1024
"""Largest experiment file. It is written by hand; a larger file is a mistake."""


class _ExperimentLoader(yaml.SafeLoader):
    """YAML's safe loader that also refuses repeated keys, keys that are not text, aliases, and lone surrogates."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # A few nested aliases describe billions of values ("billion laughs").
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed: write the value out", problem_mark=mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        # "\ud800" is a lone surrogate: it cannot be written to a file, a terminal or MLflow.
        if isinstance(text, str) and not is_unicode(text):
            raise yaml.MarkedYAMLError(problem=f"{text!r} is not text in Unicode", problem_mark=node.start_mark)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key_node.value!r} is not text: put it in quotes if it is meant so"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} occurs twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads `1e-3` and `1.0e3` as text; a learning rate written like this is a number.
_ExperimentLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """The plain data (mappings, lists, text, numbers, true, false, null) in the text.

    Raises ExperimentError with source and line if the text is not plain, unambiguous YAML.
    """
    try:
        return yaml.load(text, Loader=_ExperimentLoader)
    except yaml.MarkedYAMLError as error:
        key = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ExperimentError([Problem(key=key, what=f"not valid YAML: {what}")], source) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2001-99-99, a number of 5,000 digits
        reason = str(error).splitlines()[0]
        raise ExperimentError([Problem(key="", what=f"not valid YAML: {reason}")], source) from None
    except RecursionError:
        raise ExperimentError([Problem(key="", what="not valid YAML: nested too deeply")], source) from None


def read_yaml(path: Path) -> Any:
    """The plain data in a file; raises ExperimentError if it is no readable YAML file of at most `MAX_FILE_BYTES`."""
    try:
        if path.exists() and not path.is_file():  # a folder, or an endless device such as /dev/zero
            raise ExperimentError([Problem(key="", what="is not a file")], str(path))
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content[:MAX_FILE_BYTES].decode("utf-8") if len(content) <= MAX_FILE_BYTES else ""
    except FileNotFoundError:
        raise ExperimentError([Problem(key="", what=f"no such file{_similar_file(path)}")], str(path)) from None
    except UnicodeDecodeError as error:
        what = f"not a text file in UTF-8 (byte {error.start})"
        raise ExperimentError([Problem(key="", what=what)], str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ExperimentError([Problem(key="", what=f"cannot be read: {reason}")], str(path)) from None
    if len(content) > MAX_FILE_BYTES:
        what = f"too large for an experiment file; allowed: at most {MAX_FILE_BYTES // 1024} KiB"
        raise ExperimentError([Problem(key="", what=what)], str(path))
    return parse_yaml(text, str(path))


def _similar_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f", did you mean '{path.parent / matches[0]}'?" if matches else ""
