"""Draws rows from a source in a fixed order, apart from the rows and groups that earlier splits hold."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loragrid.data.bad_rows import BadRow, BadRowError
from loragrid.data.groups import RowTexts, group_of, texts_of
from loragrid.data.labelled_tokens import LabelledTokens
from loragrid.data.shapes import Shape
from loragrid.data.sources import RowSource
from loragrid.data.tokenization import RowTokenizer
from loragrid.trials.skip_reasons import BAD_ROW

MOST_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows, their shape, the tokenizer of their kind, and the column of their groups (None: see `group_of`).

    skips_bad_rows: whether a row that is refused is skipped and counted.
    """

    rows: RowSource
    shape: Shape
    tokenizer: RowTokenizer
    group_by: str | None = None
    skips_bad_rows: bool = False

    def error_of(self, bad: BadRow, index: int) -> BadRowError:
        """The error about row number `index`: source, row, column, fault and remedy."""
        column = "" if bad.column is None else f", column {self.shape.own_name(bad.column)}"
        remedy = "data.on_bad_row: skip leaves such rows out"
        return BadRowError(f"{self.rows.title}: {self.rows.place(index)}{column}: {bad.what}; {remedy}")


@dataclass(frozen=True, kw_only=True)
class ChosenRow:
    """A row of a split: its tokens, its group and the digests of its texts."""

    tokens: LabelledTokens
    group: int
    texts: RowTexts


@dataclass(kw_only=True)
class Held:
    """What earlier splits hold: tokens of a row, and group -> the reason why another split cannot take it."""

    rows: dict[tuple[int, ...], str] = field(default_factory=dict)
    groups: dict[int, str] = field(default_factory=dict)

    def add(self, rows: Sequence[ChosenRow], *, same: str, in_group: str) -> None:
        """Note the rows of a split; a row and a group that are noted already keep their reasons."""
        self.rows = {row.tokens.input_ids: same for row in rows} | self.rows
        self.groups = {row.group: in_group for row in rows} | self.groups


class Deck:
    """The rows of a source that no split has read yet, in an order that depends only on `purpose` and their number.

    held: what earlier splits hold. skipped: counts the rows that were read and not used, by reason.
    """

    def __init__(self, source: Source, purpose: str, held: Held, skipped: Counter[str]) -> None:
        self.source = source
        self._order = permutation(source.rows.num_rows, purpose).tolist()
        self._held, self._skipped = held, skipped

    def take(self, num_wanted: int | None) -> list[ChosenRow]:
        """The next `num_wanted` (None: all) usable rows. A row whose group an earlier split holds is skipped."""
        taken, num_read = self._first_usable(self._order, num_wanted)
        self._order = self._order[num_read:]
        return taken

    def take_from_few_groups(self, num_wanted: int, share: float) -> list[ChosenRow]:
        """The next `num_wanted` usable rows of groups that together hold at most `share` of the source's rows.

        If these groups have too few usable rows, the share is doubled until they have enough or all groups are allowed.
        Rows of groups that an earlier split holds stay in the deck. The groups of all rows are read, once.
        """
        taken: list[ChosenRow] = []
        read: set[int] = set()
        while True:
            allowed = self._groups_within(share, {row.group for row in taken})
            order = [index for index in self._order if self._groups[index] in allowed and index not in read]
            found, num_read = self._first_usable(order, num_wanted - len(taken))
            taken += found
            read.update(order[:num_read])
            if len(taken) == num_wanted or share >= 1:
                self._order = [index for index in self._order if index not in read]
                return taken
            share *= 2

    def count_kept_apart(self) -> None:
        """Count the rows left in the deck whose group an earlier split holds; a message about too few rows needs it."""
        if self._are_read:
            self._skipped.update(
                self._held.groups[group]
                for group in (self._groups[index] for index in self._order)
                if group in self._held.groups
            )

    def _first_usable(self, order: Sequence[int], num_wanted: int | None) -> tuple[list[ChosenRow], int]:
        """The first `num_wanted` (None: all) usable rows in `order`, and the number of rows read for them."""
        taken: list[ChosenRow] = []
        num_read = 0
        while num_read < len(order) and (num_wanted is None or len(taken) < num_wanted):
            # Read no more rows than are missing: otherwise usable rows would be read and not taken.
            num_missing = MOST_ROWS_AT_ONCE if num_wanted is None else num_wanted - len(taken)
            indices = order[num_read : num_read + min(num_missing, MOST_ROWS_AT_ONCE)]
            taken += self._usable(indices)
            num_read += len(indices)
        return taken, num_read

    def _usable(self, indices: Sequence[int]) -> list[ChosenRow]:
        """The usable ones of these rows; the others are counted. Only rows of free groups are tokenized."""
        source, free = self.source, []
        for index, read in zip(indices, source.rows.read(indices), strict=True):
            row = source.shape.canonical(read)
            group = self._groups[index] if self._are_read else self._group_of(read)
            if group in self._held.groups:
                self._skipped[self._held.groups[group]] += 1
            else:
                free.append((index, row, group))
        chosen = []
        for found, (index, row, group) in zip(
            source.tokenizer.tokenize([row for _, row, _ in free]), free, strict=True
        ):
            if isinstance(found, BadRow):
                if not source.skips_bad_rows:
                    raise source.error_of(found, index)
                self._skipped[BAD_ROW] += 1
            elif isinstance(found, str):
                self._skipped[found] += 1
            else:
                for tokens in found:
                    if tokens.input_ids in self._held.rows:
                        self._skipped[self._held.rows[tokens.input_ids]] += 1
                    else:
                        chosen.append(ChosenRow(tokens=tokens, group=group, texts=texts_of(row)))
        return chosen

    def _groups_within(self, share: float, first: set[int]) -> set[int]:
        """Groups in the deck's order, as long as they and `first` hold at most `share` of the source's rows.

        A group that is too large for what is left of the share is passed over. Groups of earlier splits are left out.
        """
        allowed, room = set(first), share * len(self._groups) - sum(self._sizes[group] for group in first)
        for index in self._order:
            group = self._groups[index]
            if group not in allowed and group not in self._held.groups and self._sizes[group] <= room:
                allowed.add(group)
                room -= self._sizes[group]
        return allowed

    @cached_property
    def _groups(self) -> list[int]:
        """The group of every row of the source, by its number."""
        every = range(self.source.rows.num_rows)
        return [
            self._group_of(row)
            for start in every[::MOST_ROWS_AT_ONCE]
            for row in self.source.rows.read(every[start : start + MOST_ROWS_AT_ONCE])
        ]

    @property
    def _are_read(self) -> bool:
        return "_groups" in vars(self)  # where a cached property keeps its value

    @cached_property
    def _sizes(self) -> Counter[int]:
        return Counter(self._groups)

    def _group_of(self, row: Mapping[str, Any]) -> int:
        by = self.source.group_by
        return group_of(self.source.shape.canonical(row), None if by is None else row.get(by))


def permutation(num_rows: int, purpose: str) -> Tensor:
    """The numbers of all rows (num_rows,) in an order that depends only on the purpose."""
    seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7], "big")
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
