"""Draws rows from a source in a fixed order, apart from the rows and groups that earlier splits hold."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loragrid.data.bad_rows import BadRow, BadRowError, RowFaults
from loragrid.data.files.sources import RowSource
from loragrid.data.groups import RowTexts, group_of, text_digest, texts_of
from loragrid.data.labelled_tokens import LabelledTokens
from loragrid.data.shapes.conversions import Canonical
from loragrid.data.shapes.recognition import NUM_ROWS_LOOKED_AT, Shape
from loragrid.data.tokenization import RowTokenizer
from loragrid.trials.skip_reasons import SURPLUS_TURNS

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

    def canonical(self, read: Mapping[str, Any] | BadRow) -> Canonical:
        """The canonical row of a row as it was read, why it is refused, or the reason why it is skipped."""
        return read if isinstance(read, BadRow) else self.shape.canonical(read)

    def group_of(self, read: Mapping[str, Any] | BadRow, index: int, row: Canonical | None = None) -> int:
        """The group of row number `index`, as it was read; a row that cannot be used is a group of its own.

        row: the canonical row, if it is known.
        """
        value = None if self.group_by is None or isinstance(read, BadRow) else read.get(self.group_by)
        if value is not None and value != "":
            return group_of({}, value)
        canonical = self.canonical(read) if row is None else row
        if isinstance(canonical, (str, BadRow)):
            return text_digest(f"row {index} of {self.rows.fingerprint}")
        return group_of(canonical)

    def with_notes(self, tokens: LabelledTokens, index: int) -> LabelledTokens:
        """The tokens of row number `index` with what its reader noticed about it."""
        noticed = self.rows.notes.get(index)
        return tokens if noticed is None else replace(tokens, notes=(*tokens.notes, noticed))


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

    held: what earlier splits hold. skipped: counts the rows that were read and not used, by reason. faults: what is
    wrong with those that are skipped as bad rows.
    """

    def __init__(
        self, source: Source, purpose: str, held: Held, skipped: Counter[str], faults: RowFaults | None = None
    ) -> None:
        self.source = source
        self._order = permutation(source.rows.num_rows, purpose).tolist()
        self._held, self._skipped = held, skipped
        self._faults = RowFaults() if faults is None else faults

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
        """The first `num_wanted` (None: all) usable rows in `order`, and the number of rows read for them.

        One row of the source can become several rows; those beyond `num_wanted` are dropped and counted, because their
        group belongs to the split.
        """
        taken: list[ChosenRow] = []
        num_read = 0
        while num_read < len(order) and (num_wanted is None or len(taken) < num_wanted):
            # Read no more rows than are missing: otherwise usable rows would be read and not taken.
            num_missing = MOST_ROWS_AT_ONCE if num_wanted is None else num_wanted - len(taken)
            indices = order[num_read : num_read + min(num_missing, MOST_ROWS_AT_ONCE)]
            for index, outcome in zip(indices, self._read(indices), strict=True):
                if num_wanted is not None and len(taken) >= num_wanted:
                    break
                num_read += 1
                if isinstance(outcome, BadRow):
                    if not self.source.skips_bad_rows:
                        raise row_error(
                            self.source.rows, index, outcome, self.source.shape, remedy=self._remedy_for_all()
                        )
                    self._skipped[outcome.reason] += 1
                    self._faults.add(outcome, _place(self.source.rows, index, outcome, self.source.shape))
                    continue
                usable = [part for part in outcome if isinstance(part, ChosenRow)]
                room = len(usable) if num_wanted is None else num_wanted - len(taken)
                taken += usable[:room]
                self._skipped.update(part for part in outcome if isinstance(part, str))
                self._skipped.update([SURPLUS_TURNS] * len(usable[room:]))
        return taken, num_read

    def _read(self, indices: Sequence[int]) -> list[list[ChosenRow | str] | BadRow]:
        """Of each row what can be used of it and the reasons for the rest. Only rows of free groups are tokenized."""
        source = self.source
        outcomes: dict[int, list[ChosenRow | str] | BadRow] = {}
        free: list[tuple[int, dict[str, Any], int]] = []
        for index, read in zip(indices, source.rows.read(indices), strict=True):
            row = source.canonical(read)
            if isinstance(row, (str, BadRow)):
                outcomes[index] = [row] if isinstance(row, str) else row
                continue
            group = self._groups[index] if self._are_read else source.group_of(read, index, row)
            if group in self._held.groups:
                outcomes[index] = [self._held.groups[group]]
            else:
                free.append((index, row, group))
        tokenized = source.tokenizer.tokenize([row for _, row, _ in free])
        for found, (index, row, group) in zip(tokenized, free, strict=True):
            if isinstance(found, BadRow):
                outcomes[index] = found
            else:
                outcomes[index] = [self._chosen(part, index, group, row) for part in found]
        return [outcomes[index] for index in indices]

    def _remedy_for_all(self) -> str | None:
        """What to do if not single rows are bad, but every row that is looked at; None otherwise."""
        source = self.source
        numbers = range(min(source.rows.num_rows, NUM_ROWS_LOOKED_AT))
        rows = [source.canonical(read) for read in source.rows.read(numbers)]
        free = [row for row in rows if isinstance(row, dict)]
        if len(rows) < 2 or any(isinstance(row, str) for row in rows):
            return None
        if not all(isinstance(found, BadRow) for found in source.tokenizer.tokenize(free)):
            return None
        is_chat = "messages" in source.shape.columns
        other = "another template (data.chat_template)" if is_chat else "other columns (data.columns)"
        return f"each of the first {len(rows)} rows is refused: mend the file, or choose {other}"

    def _chosen(self, tokens: LabelledTokens | str, index: int, group: int, row: Mapping[str, Any]) -> ChosenRow | str:
        """The row of a split, or the reason why the tokens are not used."""
        if isinstance(tokens, str):
            return tokens
        held = self._held.rows.get(tokens.input_ids)
        if held is not None:
            return held
        return ChosenRow(tokens=self.source.with_notes(tokens, index), group=group, texts=texts_of(row))

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
        source, every = self.source, range(self.source.rows.num_rows)
        return [
            source.group_of(row, index)
            for start in every[::MOST_ROWS_AT_ONCE]
            for index, row in enumerate(source.rows.read(every[start : start + MOST_ROWS_AT_ONCE]), start)
        ]

    @property
    def _are_read(self) -> bool:
        return "_groups" in vars(self)  # where a cached property keeps its value

    @cached_property
    def _sizes(self) -> Counter[int]:
        return Counter(self._groups)


def row_error(
    rows: RowSource, index: int, bad: BadRow, shape: Shape | None = None, *, remedy: str | None = None
) -> BadRowError:
    """The error about row number `index`: source, place, column, fault and remedy.

    remedy: None if single rows are bad.
    """
    remedy = remedy or "mend the row, or leave such rows out with data.on_bad_row: skip"
    return BadRowError(f"{rows.title}: {_place(rows, index, bad, shape, with_key=False)}: {bad.what}; {remedy}")


def _place(rows: RowSource, index: int, bad: BadRow, shape: Shape | None, *, with_key: bool = True) -> str:
    """The place of a bad row, with its column, and with the key of its source if that is not `data.name`."""
    own = bad.column if shape is None or bad.column is None else shape.own_name(bad.column)
    key = f" of {rows.key}" if with_key and rows.key != "data.name" else ""
    return f"{rows.place(index)}{key}" + ("" if own is None else f", column {own}")


def permutation(num_rows: int, purpose: str) -> Tensor:
    """The numbers of all rows (num_rows,) in an order that depends only on the purpose."""
    seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7], "big")
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
