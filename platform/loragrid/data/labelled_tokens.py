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


class TokenizesRows(Protocol):
    """Tokenizes canonical rows of one kind."""

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokenized]:
        """What becomes of each row."""
        ...


def usable(tokenized: Tokenized, *, max_length: int, loss_on: Literal["completion", "all"]) -> Tokenized:
    """The rows of tokens that can be used, all tokens being labels with `loss_on="all"`; the reason if none can."""
    if isinstance(tokenized, (str, BadRow)):
        return tokenized
    reasons, kept = [], []
    for row in tokenized:
        found = replace(row, label_positions=tuple(range(len(row.input_ids) - 1))) if loss_on == "all" else row
        if len(found.input_ids) > max_length:
            reasons.append(TOO_LONG)
        elif not found.label_positions:
            reasons.append(WITHOUT_LABELS)
        else:
            kept.append(found)
    return tuple(kept) or (reasons[0] if reasons else WITHOUT_LABELS)
