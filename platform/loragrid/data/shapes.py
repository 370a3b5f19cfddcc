"""Recognises the shape of a source's rows, and turns its rows into canonical rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loragrid.data.sources import RowSource, find_columns


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the rows of a source become canonical rows.

    name: the shape in words, such as "prompt and completion". columns: canonical column -> the source's own column.
    """

    name: str
    columns: Mapping[str, str]

    def canonical(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the canonical columns only."""
        return {canonical: row.get(column) for canonical, column in self.columns.items()}

    def own_name(self, column: str) -> str:
        """The source's own name of a canonical column."""
        return self.columns.get(column, column)


def recognise(source: RowSource, columns: Mapping[str, str]) -> Shape:
    """The shape of a source's rows; columns: see `find_columns`.

    Raises:
        ValueError: the rows have no known shape, or several.
    """
    found = find_columns(source, columns)
    return Shape(name=_listed(list(found)), columns=found)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
