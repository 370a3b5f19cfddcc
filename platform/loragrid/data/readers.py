"""Reads local .jsonl, .csv and .parquet files; what is wrong with one is a ValueError that says where in the file."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

MAX_LINE_BYTES = 32 * 2**20
"""A row is text for a model, at most a few million tokens; a longer line is none, and would fill the memory."""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line."""
    return [_parse_row(line, number) for number, line in _numbered_lines(path) if line.strip()]


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a file whose first line names the columns."""
    import pandas

    num_lines = sum(bool(line.strip()) for _, line in _numbered_lines(path))  # and every line is seen to be one
    if not num_lines:
        return []
    # Everything stays text: "007" is no number and "NA" is no missing value.
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict(orient="records")]


def read_parquet(path: Path) -> "pyarrow.Table":
    """The table, every value in it seen to be one of its column's type."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"not a whole Parquet file: {error}") from error
    return table


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): U+2028 and its like are ordinary characters inside a JSON string.
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
