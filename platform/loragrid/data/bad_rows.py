"""A row that does not hold what its source or its columns promise: it is refused, or skipped and counted."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """What a tokenizer returns in place of a row that it refuses. Its reader knows the file and the row's place.

    what: the fault, as the end of a sentence. column: the canonical column that holds it; None: the whole row.
    """

    what: str
    column: str | None = None


class BadRowError(ValueError):
    """A row is refused; the message names source, row, column, fault and remedy."""
