"""Reads CSV files as RFC 4180 describes them, and refuses every line whose fields could be read in two ways."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loragrid.data.bad_rows import BadRow
from loragrid.data.files.file_rows import FileRows
from loragrid.data.files.text_lines import CARRIAGE_RETURNS, MAX_LINE_BYTES, ends_with_carriage_returns, numbered_lines
from loragrid.formatting import count_of
from loragrid.trials.skip_reasons import BROKEN_LINE

LINES_LIKE_ROWS = "lines_like_rows"
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
INDEX_COLUMN = "(column 1, without a name)"

_FIELD = re.compile(r'(?:"(?:[^"]|"")*"|([^,]*))(,|$)')
"""One field of a record that the csv module accepts; group 1: the field's text if it is not in quotes."""


def read_csv(path: Path) -> FileRows:
    """The rows of a file whose first line names the columns; every value is text, and blank lines are no rows.

    A row with another number of fields than the header is a `BadRow`. A fault of quotes is one of the whole file,
    because nobody knows where its row ends.

    Raises:
        ValueError: the file is not text, its first line names no columns, or its quotes are wrong.
    """
    records = _records(path)
    _, header, _ = next(records, (0, [], False))
    if not header:
        return FileRows.of([])
    columns = _columns(header)
    rows: list[dict[str, Any] | BadRow] = []
    lines: list[int] = []
    notes: dict[int, str] = {}
    for line, fields, looks_like_rows in records:
        if len(fields) == 1 and len(columns) > 1 and not fields[0].strip():
            continue
        if looks_like_rows:
            notes[len(rows)] = LINES_LIKE_ROWS
        rows.append(_row(fields, columns, header))
        lines.append(line)
    return FileRows.of(rows, columns=columns, lines=lines, notes=notes)


def _records(path: Path) -> Iterator[tuple[int, list[str], bool]]:
    """The line at which a record begins, its fields, and whether all of its three or more lines look like records."""
    raw: list[str] = []

    def lines() -> Iterator[str]:
        for number, line in numbered_lines(path):
            if number == 1:
                _check_first_line(line)
            raw.append(line)
            yield line

    def place() -> str:
        return f"line {first}" if len(raw) < 2 else f"lines {first} to {first + len(raw) - 1}"

    reader = csv.reader(lines(), strict=True)
    num_fields = 0
    limit = csv.field_size_limit(MAX_LINE_BYTES)  # the module's own limit is 128 KiB
    try:
        while True:
            first = reader.line_num + 1
            raw.clear()
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"{place()}: {_reason(error, raw)}") from error
            if not fields:
                continue
            text = "".join(raw).rstrip("\r\n")
            if '"' in text and (fault := _quote_fault(text)):
                raise ValueError(f"{place()}: {fault}")
            num_fields = num_fields or len(fields)
            yield first, fields, len(raw) > 2 and all(line.count(",") + 1 == num_fields > 1 for line in raw)
    finally:
        csv.field_size_limit(limit)


def _check_first_line(line: str) -> None:
    text = line.strip()
    if re.fullmatch(r'"?sep=.?"?', text, re.IGNORECASE):
        raise ValueError(f"line 1 is {text!r}, a note for Excel; remove it, and separate the fields with commas")
    if text.startswith("#"):
        raise ValueError("line 1 begins with '#'; the first line names the columns: remove comments")
    for delimiter, name in OTHER_DELIMITERS.items():
        if delimiter in text and "," not in text:
            raise ValueError(f"line 1: its fields are separated by {name} ({delimiter!r}); save the file with commas")


def _columns(header: list[str]) -> list[str]:
    for number, name in enumerate(header, 1):
        if name != name.strip():
            raise ValueError(f"line 1: the column name {name!r} begins or ends with a blank; remove the blank")
        if name and header.count(name) > 1:
            raise ValueError(f"line 1: several columns have the name {name!r}; rename or remove all but one")
        # Tables are often saved with a first column of row numbers, which has no name.
        if not name and (number > 1 or len(header) == 1):
            every = ", and every line ends with a comma" if number == len(header) else ""
            raise ValueError(f"line 1: column {number} has no name{every}; name it or remove it")
    return [name or INDEX_COLUMN for name in header]


def _row(fields: list[str], columns: list[str], header: list[str]) -> dict[str, Any] | BadRow:
    if len(fields) == len(columns):
        if [fields[0].removeprefix("\ufeff"), *fields[1:]] == header:
            return BadRow(what="repeats line 1, as if a second file began here", reason=BROKEN_LINE)
        return dict(zip(columns, fields, strict=True))
    what = f"has {count_of(len(fields), 'field')}, but line 1 names {count_of(len(columns), 'column')}"
    if len(fields) > len(columns):
        last = "; it ends with a comma" if not fields[-1] else ""
        what += f"{last}; a field with a comma must be in quotes"
    return BadRow(what=what, reason=BROKEN_LINE)


def _reason(error: csv.Error, raw: list[str]) -> str:
    text = "".join(raw)
    if "new-line character" in str(error) or ('"' not in text and ends_with_carriage_returns(text)):
        return CARRIAGE_RETURNS
    if "unexpected end" in str(error):
        return "a quote opens a field and is never closed"
    if "expected after" in str(error):
        escaped = '\\"' in text
        rule = 'a quote in a field is written twice ("")'
        return f"text follows a closing quote; {rule}{', not with a backslash' if escaped else ''}"
    return str(error)


def _quote_fault(text: str) -> str | None:
    """Why a record with quotes can be read in two ways; None if it cannot."""
    position = 0
    while match := _FIELD.match(text, position):
        unquoted, end = match.groups()
        if unquoted and '"' in unquoted:
            if unquoted.lstrip().startswith('"'):
                return "a blank is before the quote that opens a field; remove the blank"
            if '\\"' in unquoted:
                return 'a quote is written with a backslash; put the field in quotes, and write each quote twice ("")'
        if not end:
            return None
        position = match.end()
    return None
