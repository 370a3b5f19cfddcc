"""Readers of local data files, in a table by suffix. An unreadable file raises ValueError."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 32 * 2**20
"""Longest line of a text format. It holds millions of tokens; a longer line could fill the memory."""


@dataclass(frozen=True, kw_only=True)
class FileRows:
    """The rows of a file. read: row numbers, counted from 0 -> those rows, each as column -> value."""

    columns: tuple[str, ...]
    num_rows: int
    read: Callable[[Sequence[int]], list[dict[str, Any]]]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> "FileRows":
        """Rows in memory; `columns` are all columns that occur in any row."""
        columns = tuple(dict.fromkeys(column for row in rows for column in row))
        return cls(columns=columns, num_rows=len(rows), read=lambda indices: [rows[index] for index in indices])


def read_jsonl(path: Path) -> FileRows:
    """The rows of a file with one JSON object per line."""
    return FileRows.of([_parse_row(line, number) for number, line in _numbered_lines(path) if line.strip()])


def read_csv(path: Path) -> FileRows:
    """The rows of a file whose first line names the columns; every value is text."""
    import pandas

    num_lines = sum(bool(line.strip()) for _, line in _numbered_lines(path))  # also checks every line
    if not num_lines:
        return FileRows.of([])
    # Everything stays text: "007" must not become 7, nor "NA" a missing value.
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    return FileRows.of([{str(name): value for name, value in row.items()} for row in frame.to_dict(orient="records")])


def read_parquet(path: Path) -> FileRows:
    """The rows of a Parquet file, after a check of every value against its column's type."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"not a whole Parquet file: {error}") from error

    def read(indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            rows: list[dict[str, Any]] = table.take(list(indices)).to_pylist()
        except (ValueError, ArithmeticError) as error:  # such as a date in the year 300,000
            raise ValueError(f"holds a value that cannot be read: {error}") from error
        return rows

    return FileRows(columns=tuple(table.column_names), num_rows=table.num_rows, read=read)


def read_text(path: Path) -> FileRows:
    """The whole file as one row with the column `text`."""
    return FileRows.of([{"text": path.read_text(encoding="utf-8")}])


FORMATS: dict[str, Callable[[Path], FileRows]] = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
"""Suffix -> reader of the files that hold rows; a new format is one more entry.

A reader raises ValueError with the place in the file; its caller adds the experiment's key and the file's name.
"""

TEXT_FORMATS: dict[str, Callable[[Path], FileRows]] = {".txt": read_text}
"""Suffix -> reader of plain-text files; rows never come from them, but held-out text may."""


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    # splitlines() would also split at U+2028 and the like, which are ordinary characters inside a JSON string.
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB; allowed: one row a line, each of at "
                    "most that size (longer text in several rows)"
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not text in UTF-8: {error}") from error


def _parse_row(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError(f"line {number} is not JSON of a row: nested too deeply") from None
    except ValueError as error:  # a JSONDecodeError, or a number of more than 4,300 digits
        raise ValueError(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not a JSON object (a row with named columns)")
    return row
