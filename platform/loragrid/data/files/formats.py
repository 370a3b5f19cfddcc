"""Readers of local data files, in a table by suffix. An unreadable file raises ValueError."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loragrid.data.bad_rows import BadRow
from loragrid.data.files.csv_rows import read_csv
from loragrid.data.files.file_rows import FileRows, without_padding
from loragrid.data.files.json_rows import read_json, read_jsonl
from loragrid.data.files.text_lines import numbered_lines


def read_parquet(path: Path) -> FileRows:
    """The rows of a Parquet file, after a check of every value against its column's type."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
        table.validate(full=True)
        for number, field in enumerate(table.schema):
            if pyarrow.types.is_string_view(field.type):  # rows of this type cannot be taken by number
                table = table.set_column(number, field.name, table.column(number).cast(pyarrow.large_string()))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"not a whole Parquet file: {error}") from error
    twice = [name for name in dict.fromkeys(table.column_names) if table.column_names.count(name) > 1]
    if twice:
        raise ValueError(f"has several columns with the name {twice[0]!r}; rename or remove all but one")

    def read(indices: Sequence[int]) -> list[dict[str, Any] | BadRow]:
        try:
            return [without_padding(row) for row in table.take(list(indices)).to_pylist()]
        except (ValueError, ArithmeticError, pyarrow.ArrowException) as error:  # such as a date in the year 300,000
            raise ValueError(f"holds a value that cannot be read: {error}") from error

    return FileRows(columns=tuple(table.column_names), num_rows=table.num_rows, read=read)


def read_text(path: Path) -> FileRows:
    """The whole file as one row with the column `text`."""
    return FileRows.of([{"text": "".join(line for _, line in numbered_lines(path))}])


FORMATS: dict[str, Callable[[Path], FileRows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
"""Suffix -> reader of the files that hold rows; a new format is one more entry.

A reader raises ValueError with the place in the file for a fault of the file, and gives a `BadRow` in place of a row
that is broken by itself; its caller adds the experiment's key and the file's name.
"""

TEXT_FORMATS: dict[str, Callable[[Path], FileRows]] = {".txt": read_text}
"""Suffix -> reader of plain-text files; rows never come from them, but held-out text may."""

_REMEDIES = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"), "it is compressed: unpack it first"),
    **dict.fromkeys((".tsv", ".tab", ".psv"), "save it as .csv with commas between the fields"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "save the sheet as .csv (CSV UTF-8)"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro", ".pkl", ".pickle"), "save it as .parquet or .jsonl"),
    **dict.fromkeys((".ndjson", ".jsonlines", ".jl"), "rename it to .jsonl"),
    **dict.fromkeys((".yaml", ".yml", ".xml", ".toml"), "save its rows as .jsonl"),
}
"""Suffix of a file that holds rows in a format that is not read -> what to do."""


def reader_of(name: str, formats: dict[str, Callable[[Path], FileRows]]) -> Callable[[Path], FileRows] | None:
    """The reader of a file by the end of its name, whatever its letters' case; None for an unknown format."""
    return formats.get(Path(name).suffix.lower())


def remedy_for(path: Path) -> str:
    """What to do with a file that no reader reads, as the rest of a sentence; empty if nothing is known."""
    if path.is_dir():
        return "; it is a folder: name one file"
    remedy = _REMEDIES.get(path.suffix.lower())
    return f"; {remedy}" if remedy else ""
