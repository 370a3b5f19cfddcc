"""Reads files of JSON: one object a line, or one array of objects."""

from pathlib import Path
from typing import Any

from loragrid.data.bad_rows import BadRow
from loragrid.data.files.file_rows import FileRows
from loragrid.data.files.strict_json import parse_first_json, parse_json
from loragrid.data.files.text_lines import CARRIAGE_RETURNS, ends_with_carriage_returns, numbered_lines
from loragrid.trials.skip_reasons import BROKEN_LINE

_BLANKS = " \t\r\n"


def read_jsonl(path: Path) -> FileRows:
    """The rows of a file with one JSON object per line; blank lines are no rows."""
    rows: list[dict[str, Any] | BadRow] = []
    lines: list[int] = []
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        row = _row_of(line)
        if isinstance(row, BadRow):
            if ends_with_carriage_returns(line):
                raise ValueError(f"line {number}: {CARRIAGE_RETURNS}")
            if not rows:
                _check_is_no_other_json(path)
        rows.append(row)
        lines.append(number)
    if len(rows) == 1 and _is_table_by_column(rows[0]):
        raise ValueError(f"line {lines[0]} holds whole columns, not a row{remedy_for_nested(rows[0])}")
    return FileRows.of(rows, lines=lines)


def read_json(path: Path) -> FileRows:
    """The rows of a file with one JSON array of objects, or with one JSON object per line."""
    text = "".join(line for _, line in numbered_lines(path))
    start = _next(text, 0)
    if start == len(text):
        return FileRows.of([])
    if text[start] != "[":
        _check_is_no_other_json(path)
        return read_jsonl(path)
    rows: list[dict[str, Any] | BadRow] = []
    lines: list[int] = []
    position, line = _next(text, start + 1), 1 + text.count("\n", 0, start + 1)
    counted = start + 1
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = parse_first_json(text, position)
        except ValueError as error:
            raise ValueError(f"the value that begins in line {line} is not JSON: {error}") from error
        rows.append(value if isinstance(value, dict) else _no_object(value))
        lines.append(line)
        position = _next(text, end)
        if text[position : position + 1] == ",":
            position = _next(text, position + 1)
            if text[position : position + 1] == "]":
                raise ValueError("the array ends with a comma after its last value; remove the comma")
        elif text[position : position + 1] != "]":
            raise ValueError(f"after the value that begins in line {line}, a comma or the array's end is missing")
    if _next(text, position + 1) != len(text):
        raise ValueError("holds more than one JSON array; allowed: one array of objects, or one object a line")
    return FileRows.of(rows, lines=lines)


def _row_of(line: str) -> dict[str, Any] | BadRow:
    try:
        row = parse_json(line.strip(_BLANKS))
    except ValueError as error:  # not JSON, or a number of more than 4,300 digits
        more = "" if not str(error).startswith("Extra data") else " (one JSON object a line)"
        return BadRow(what=f"not JSON: {error}{more}", reason=BROKEN_LINE)
    return row if isinstance(row, dict) else _no_object(row)


def _no_object(value: Any) -> BadRow:
    kind = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
    return BadRow(what=f"{kind}, not a JSON object (a row with named columns)", reason=BROKEN_LINE)


def _check_is_no_other_json(path: Path) -> None:
    """Refuse a file whose first JSON value is an array, or covers several lines: no line of it is a row."""
    text = "".join(line for _, line in numbered_lines(path))
    start = _next(text, 0)
    try:
        value, end = parse_first_json(text, start)
    except ValueError:
        return
    first, last = 1 + text.count("\n", 0, start), 1 + text.count("\n", 0, end)
    whole = last > first or _next(text, end) == len(text)
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value) and whole:
        raise ValueError(f"line {first} begins a JSON array, not one object a line; rename the file to .json")
    if last > first:
        raise ValueError(
            f"the JSON object that begins in line {first} ends in line {last}; allowed: one object a line (.jsonl), or "
            f"one array of objects (.json){remedy_for_nested(value)}"
        )


def remedy_for_nested(value: Any) -> str:
    """How to save rows that are held by one object, as the rest of a sentence; empty if it holds none."""
    if not isinstance(value, dict) or not value or "role" in value:
        return ""
    if _is_table_by_column(value):
        return '; pandas writes rows with to_json(orient="records")'
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) == 1:
        return f"; save the array in its key {lists[0]!r} as a file of its own"
    keys = ", ".join(map(repr, lists))
    return f"; save the arrays in its keys {keys} as files of their own" if lists else ""


def _is_table_by_column(value: object) -> bool:
    """Whether an object holds columns as pandas writes them by default: under each name the values by row number."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(item, dict) and [*item] == [str(n) for n in range(len(item))] for item in value.values())
    )


def _next(text: str, position: int) -> int:
    """The index of the next character that is not blank; the length of the text if there is none."""
    while position < len(text) and text[position] in _BLANKS:
        position += 1
    return position
