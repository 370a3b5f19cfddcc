"""A row that does not hold what its source or its columns promise: it is refused, or skipped and counted."""

import re
from collections import Counter
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


MOST_EXAMPLES = 3
MAX_EXAMPLE_CHARACTERS = 240

Examples = dict[str, list[tuple[int, str]]]
"""Reason for which rows are skipped -> of its most frequent faults the number of rows, and one row's fault in words."""


class RowFaults:
    """The faults of skipped rows: how many rows have each, and the words about one of them.

    Two rows have the same fault if their words differ in numbers and quoted values only.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._words: dict[tuple[str, str], str] = {}

    def add(self, bad: BadRow, place: str) -> None:
        """Count a skipped row; place: where it is and which column it is about."""
        kind = re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "", bad.what.rsplit(": ", 1)[-1])
        key = bad.reason, f"{bad.column}: {kind}"
        self._counts[key] += 1
        words = f"{place}: {bad.what}"
        cut = words if len(words) <= MAX_EXAMPLE_CHARACTERS else f"{words[: MAX_EXAMPLE_CHARACTERS - 1]}…"
        self._words.setdefault(key, cut if cut.isprintable() else ascii(cut)[1:-1])

    def examples(self) -> Examples:
        """See `Examples`."""
        found: Examples = {}
        for (reason, kind), count in self._counts.most_common():
            of_reason = found.setdefault(reason, [])
            if len(of_reason) < MOST_EXAMPLES:
                of_reason.append((count, self._words[reason, kind]))
        return found


def with_examples(reason: str, examples: Examples) -> str:
    """The reason with one row's fault for each of its most frequent faults, if they are known."""
    found = examples.get(reason, [])
    if not found:
        return reason
    if len(found) == 1:
        return f"{reason} (such as {found[0][1]})"
    return f"{reason} ({'; '.join(f'{count:,} such as {words}' for count, words in found)})"
