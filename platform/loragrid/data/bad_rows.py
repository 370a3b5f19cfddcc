"""A row that does not hold what its source or its columns promise: it is refused, or skipped and counted."""

from dataclasses import dataclass

from loragrid.trials.skip_reasons import BAD_ROW


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """What a reader, a shape or a tokenizer returns in place of a row that it refuses; the deck knows its place.

    what: the fault, as the end of a sentence. column: the canonical or own column that holds it; None: the whole row.
    reason: the words under which skipped rows of this kind are counted.
    """

    what: str
    column: str | None = None
    reason: str = BAD_ROW


class BadRowError(ValueError):
    """A row is refused; the message names source, row, column, fault and remedy."""
