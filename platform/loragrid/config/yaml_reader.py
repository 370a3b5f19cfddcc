"""Reads an experiment file as YAML 1.2: plain data without repeated keys, empty values and aliases."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from loragrid.config.yaml_core import load_document
from loragrid.schema.errors import ExperimentError, Problem

MAX_FILE_BYTES = 256 * 1024
"""Largest experiment file. It is written by hand; a larger file is a mistake."""


def parse_yaml(text: str, source: str) -> Any:
    """The plain data (mappings, lists, text, numbers, true, false, null) in the text.

    Raises ExperimentError with source and line if the text is not plain, unambiguous YAML.
    """
    try:
        return load_document(text)
    except yaml.MarkedYAMLError as error:
        key = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ExperimentError([Problem(key=key, what=f"not valid YAML: {what}")], source) from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
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
