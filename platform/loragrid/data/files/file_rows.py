"""The rows of a file: values by column, their places, and the rows that are broken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loragrid.data.bad_rows import BadRow


@dataclass(frozen=True, kw_only=True)
class FileRows:
    """The rows of a file, numbered from 0.

    read: row numbers -> those rows, each as column -> value, or what is wrong with it. lines: the line at which each
    row begins, counted from 1; None if the format has no lines. broken: the rows that are known to be none before they
    are read. notes: row number -> name in `ROW_NOTES` of what the reader noticed about it.
    """

    columns: tuple[str, ...]
    num_rows: int
    read: Callable[[Sequence[int]], list[dict[str, Any] | BadRow]]
    lines: Sequence[int] | None = None
    broken: Mapping[int, BadRow] = field(default_factory=dict)
    notes: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: Sequence[dict[str, Any] | BadRow],
        *,
        columns: Sequence[str] | None = None,
        lines: Sequence[int] | None = None,
        notes: Mapping[int, str] | None = None,
    ) -> "FileRows":
        """Rows in memory. columns: None takes all columns that occur in any row."""
        found = columns
        if found is None:
            found = tuple(dict.fromkeys(column for row in rows if not isinstance(row, BadRow) for column in row))
        return cls(
            columns=tuple(found),
            num_rows=len(rows),
            read=lambda indices: [rows[index] for index in indices],
            lines=lines,
            broken={number: row for number, row in enumerate(rows) if isinstance(row, BadRow)},
            notes=notes or {},
        )

    def place(self, index: int) -> str:
        """Where row number `index` is in the file, for an error message."""
        return f"row {index + 1}" if self.lines is None else f"line {self.lines[index]}"


def without_padding(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that columnar formats store in objects for keys that only other objects have."""
    return {column: _unpadded(value) for column, value in row.items()}


def _unpadded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpadded(item) for key, item in value.items() if item is not None}
    return [_unpadded(item) for item in value] if isinstance(value, list) else value
