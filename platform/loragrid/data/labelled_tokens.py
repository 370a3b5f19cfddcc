"""A row as token ids with its labels, and the rule by which a tokenized row can be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from loragrid.data.bad_rows import BadRow
from loragrid.trials.skip_reasons import TOO_LONG, WITHOUT_LABELS


@dataclass(frozen=True)
class LabelledTokens:
    """One row: its token ids, and the positions p whose next token input_ids[p + 1] is a label.

    notes: names in `ROW_NOTES` of what was noticed about the row.
    """

    input_ids: tuple[int, ...]
    label_positions: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def noted(self, note: str) -> "LabelledTokens":
        """The row with another note."""
        return replace(self, notes=(*self.notes, note))


Tokenized = tuple[LabelledTokens, ...] | str | BadRow
"""What becomes of a canonical row: one or more rows of tokens, the reason why it is skipped, or why it is refused."""


Usable = tuple[LabelledTokens | str, ...] | BadRow
"""What can be used of a canonical row: rows of tokens, and the reasons why others of its rows cannot be used."""


class TokenizesRows(Protocol):
    """Tokenizes canonical rows of one kind."""

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokenized]:
        """What becomes of each row."""
        ...


def usable(tokenized: Tokenized, *, max_length: int, loss_on: Literal["completion", "all"]) -> Usable:
    """The rows of tokens, or in place of each the reason why it cannot be used; `loss_on="all"` labels all tokens."""
    if isinstance(tokenized, BadRow):
        return tokenized
    if isinstance(tokenized, str):
        return (tokenized,)
    return tuple(_usable(row, max_length, loss_on) for row in tokenized) or (WITHOUT_LABELS,)


def _usable(row: LabelledTokens, max_length: int, loss_on: Literal["completion", "all"]) -> LabelledTokens | str:
    found = replace(row, label_positions=tuple(range(len(row.input_ids) - 1))) if loss_on == "all" else row
    if len(found.input_ids) > max_length:
        return TOO_LONG
    return found if found.label_positions else WITHOUT_LABELS
