"""A deck gives exactly the rows that are wanted, also if one row of the source becomes several."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow, BadRowError
from loragrid.data.deck import Deck, Held, Source
from loragrid.data.files.file_rows import FileRows
from loragrid.data.files.sources import RowSource
from loragrid.data.labelled_tokens import LabelledTokens, Tokenized, usable
from loragrid.data.shapes.recognition import Shape
from loragrid.data.tokenization import RowTokenizer
from loragrid.trials.skip_reasons import BAD_ROW, SURPLUS_TURNS, TOO_LONG
from tests.support.tiny_tokenizers import byte_level

LONGEST = 9


class TurnsTokenizer(RowTokenizer):
    """Makes one row of tokens of each length in a row's `text`, as `data.turns: separate` does of a chat's turns."""

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """As `RowTokenizer`."""
        return [usable(self._turns(row["text"]), max_length=LONGEST, loss_on="completion") for row in rows]

    def _turns(self, text: str) -> Tokenized:
        if text == "bad":
            return BadRow(what="bad", column="text")
        name = hash(text) % 1000
        return tuple(
            LabelledTokens((name, turn, *range(int(length) - 2)), (0,)) for turn, length in enumerate(text.split())
        )


def deck(texts: Sequence[str], *, held: Held | None = None, skip: bool = False) -> tuple[Deck, Counter[str]]:
    rows = FileRows.of([{"text": text, "id": str(number)} for number, text in enumerate(texts)])
    shape = Shape(name="text", columns={"text": "text"})
    source = Source(
        rows=RowSource(
            key="data.name", name="x", columns=rows.columns, num_rows=rows.num_rows, fingerprint="x", read=rows.read
        ),
        shape=shape,
        tokenizer=TurnsTokenizer(byte_level(), shape, DataConfig(name="x"), title="x"),
        group_by="id",
        skips_bad_rows=skip,
    )
    skipped: Counter[str] = Counter()
    return Deck(source, "order", held or Held(), skipped), skipped


@pytest.mark.parametrize("num_wanted", range(1, 16))
def test_no_more_rows_than_wanted_are_taken(num_wanted: int) -> None:
    cards, skipped = deck(["5 5 5"] * 6)
    taken = cards.take(num_wanted)
    assert len(taken) == num_wanted
    assert set(skipped) <= {SURPLUS_TURNS}
    # Whole rows stay in the deck; what is left of one whose group the split holds is counted.
    assert skipped[SURPLUS_TURNS] == -num_wanted % 3
    rest = cards.take(None)
    assert len(rest) + num_wanted + skipped[SURPLUS_TURNS] == 18
    assert not {row.group for row in rest} & {row.group for row in taken}


@pytest.mark.parametrize("num_wanted", range(1, 12))
def test_few_groups_give_no_more_than_wanted(num_wanted: int) -> None:
    cards, skipped = deck(["5 5 5"] * 8)
    assert len(cards.take_from_few_groups(num_wanted, 0.1)) == num_wanted
    assert skipped[SURPLUS_TURNS] == -num_wanted % 3


def test_turns_of_one_row_are_one_group() -> None:
    cards, _ = deck(["5 6 7", "4 4"])
    taken = cards.take(None)
    assert sorted(Counter(row.group for row in taken).values()) == [2, 3]


def test_turns_that_are_too_long_are_counted_one_by_one() -> None:
    cards, skipped = deck(["5 20 6 30", "40", "3"])
    assert len(cards.take(None)) == 3
    assert skipped == {TOO_LONG: 3}


def test_a_bad_row_is_counted_only_if_it_was_needed() -> None:
    cards, skipped = deck(["5 5", "bad", "5 5", "bad", "5 5"], skip=True)
    assert len(cards.take(None)) == 6
    assert skipped == {BAD_ROW: 2}
    with pytest.raises(BadRowError, match=r"data\.name: x: row [24], column text: bad; mend the row"):
        deck(["5 5", "bad", "5 5", "bad", "5 5"])[0].take(None)


def test_tokens_and_groups_of_an_earlier_split_are_kept_apart() -> None:
    held = Held()
    first, _ = deck(["5 5"] * 4)
    held.add(first.take(2), same="same", in_group="group")
    second, skipped = deck(["5 5"] * 4, held=held)
    rest = second.take(None)
    assert not {row.group for row in rest} & set(held.groups)
    assert skipped["group"] == 1
