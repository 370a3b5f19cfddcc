"""Applies `key.path=value` overrides of the command line to the contents of an experiment file."""

from collections.abc import Mapping
from typing import Any

from loragrid.config.yaml_core import text_after_value
from loragrid.config.yaml_reader import parse_yaml
from loragrid.schema.errors import ExperimentError, Problem, show_value

SOURCE = "--set"


def apply_override(mapping: Mapping[str, Any], override: str) -> tuple[dict[str, Any], list[str]]:
    """A copy of the mapping with one override applied, and the keys it set.

    The value is read as YAML. The text after `grid.` is one key, as in the file: `grid.method.rank=[4, 8]`. A method's
    block is named by its place or its name: `methods.0.alpha=8`, `methods.lora.alpha=8` (every block of that name).

    Raises ExperimentError if the override has no `=`, its value is not YAML, or its path does not exist.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ExperimentError([Problem(key=override, what="is not an override", allowed="key.path=value")], SOURCE)
    value = _read(key, text)
    try:
        keys = _keys_in_file(mapping, key)
        changed = dict(mapping)
        for key_in_file in keys:
            changed = _with_value(changed, key_in_file, value)
    except ExperimentError as error:
        what = error.problems[0].what
        raise ExperimentError([Problem(key=key, value=value, what=what)], SOURCE) from None
    return changed, keys


def _read(key: str, text: str) -> Any:
    """The value of an override; nothing of its text may be lost."""
    value = parse_yaml(text, f"{SOURCE} {key}")
    rest = text_after_value(text)
    if rest:
        what = f"{rest!r} would be dropped as a comment: put the value in quotes if it belongs to it"
        raise ExperimentError([Problem(key=key, what=what)], SOURCE)
    if value is None and text.strip() not in ("null", "Null", "NULL", "~"):
        raise ExperimentError([Problem(key=key, what="has no value", allowed="a value, or null")], SOURCE)
    return value


def _keys_in_file(mapping: Mapping[str, Any], key: str) -> list[str]:
    """The key itself; for `methods.NAME...`, one key for each block of that name, with the block's place."""
    section, _, rest = key.partition(".")
    blocks = mapping.get(section)
    if section != "methods" or not rest or not isinstance(blocks, list | tuple):
        return [key]
    head, _, setting = rest.partition(".")
    names = [block.get("name") if isinstance(block, Mapping) else block for block in blocks]
    places = [place for place, name in enumerate(names) if head in (str(place), name)]
    if not places:
        known = ", ".join(f"{place} ({show_value(name)})" for place, name in enumerate(names))
        raise _nowhere(f"there is no method {head!r}; the methods are {known or 'none'}")
    return [".".join(part for part in ("methods", str(place), setting) if part) for place in places]


def _with_value(node: Any, path: str, value: Any) -> Any:
    """A copy of the node with the value at the path; the node itself does not change."""
    head, _, rest = path.partition(".")
    if isinstance(node, list | tuple) and head in map(str, range(len(node))):  # a method's block, by its place
        entries = list(node)
        entry = {"name": entries[int(head)]} if isinstance(entries[int(head)], str) else entries[int(head)]
        entries[int(head)] = _with_value(entry, rest, value) if rest else value
        return entries
    if not isinstance(node, Mapping | None):
        raise _nowhere(f"there are no keys in {show_value(node)}")
    copy = dict(node or {})  # a section that the file does not have is added
    if head == "grid" and rest:
        axes = copy.get("grid")
        if not isinstance(axes, Mapping | None):
            raise _nowhere(f"there are no keys in {show_value(axes)}")
        copy["grid"] = {**(axes or {}), rest: value}
    else:
        copy[head] = _with_value(copy.get(head), rest, value) if rest else value
    return copy


def _nowhere(what: str) -> ExperimentError:
    return ExperimentError([Problem(key="", what=what)])
