"""Chooses the rows of the evaluation, test and train splits; no row and no group is in two of them."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import RowFaults, with_examples
from loragrid.data.deck import ChosenRow, Deck, Held, Source, row_error
from loragrid.data.files.sources import (
    RowSource,
    find_group_column,
    open_eval_rows,
    open_test_rows,
    open_train_rows,
    shown_columns,
)
from loragrid.data.shapes.recognition import Shape, recognise
from loragrid.data.tokenization import RowTokenizer
from loragrid.trials.skip_reasons import KEPT_APART

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "evaluation", "test")
LARGEST_SHARE = {"evaluation": 0.1, "test": 0.2}
"""Largest share of the train source's rows in the groups from which a split is drawn, as long as they suffice.

What a group has left over trains nothing. So large groups stay in train, and at least 70 % of the rows do.
"""

_ORDERS = {"train": "train rows", "evaluation": "eval rows", "test": "test rows"}
_KEYS = {"evaluation": "num_eval", "test": "num_test"}
_NAMES = {"evaluation": "eval", "test": "test"}


def open_sources(data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Source]:
    """Split -> source; a split without its own source takes its rows out of the train source.

    Raises:
        ValueError: rows that cannot be found or read, columns without a known shape, or a key about chats for other
            rows.
        BadRowError: a row is broken, and `data.on_bad_row` does not skip it.
    """
    opened = {"train": open_train_rows(data), "evaluation": open_eval_rows(data), "test": open_test_rows(data)}
    sources = {split: _source(rows, data, tokenizer) for split, rows in opened.items() if rows is not None}
    if not any("messages" in source.shape.columns for source in sources.values()):
        for key in ("chat_template", "turns"):
            value = getattr(data, key)
            if value not in (None, "auto"):
                default = "null" if key == "chat_template" else "auto"
                raise ValueError(
                    f"data.{key}: {value}: {data.name} holds no chats, which this key is about; allowed: "
                    f"{default}, or rows with messages"
                )
    return sources


def choose_rows(
    data: DataConfig, sources: Mapping[str, Source], skipped: Counter[str], faults: RowFaults
) -> dict[str, list[ChosenRow]]:
    """Draw eval rows, then test rows, then train rows, and tokenize only as many rows as needed.

    The splits of one source draw from it one after another, in one fixed order. Eval and test rows that come from the
    train source are drawn from few of its groups (`LARGEST_SHARE`). A row whose group is in an earlier split is in no
    later one. `skipped` counts the rows that were read but not used, by reason, and `faults` what is wrong with those
    that are skipped as bad rows.

    Raises:
        ValueError: there are too few usable rows.
    """
    held = Held()
    decks = {split: Deck(source, _ORDERS[split], held, skipped, faults) for split, source in sources.items()}
    splits: dict[str, list[ChosenRow]] = {"evaluation": [], "test": []}
    for split, num_wanted in (("evaluation", data.num_eval), ("test", data.num_test)):
        if num_wanted:
            splits[split] = _draw(decks, split, num_wanted, skipped, faults)
            name = _NAMES[split]
            held.add(splits[split], same=KEPT_APART[f"same_as_{name}"], in_group=KEPT_APART[f"in_{name}_group"])
    train = decks["train"].take(data.num_train)
    rows, shape = sources["train"].rows, sources["train"].shape
    if not train:
        taken = [f"{len(splits[split])} {_NAMES[split]} rows (data.{key})" for split, key in _KEYS.items()]
        taken = [words for words, split in zip(taken, _KEYS, strict=True) if splits[split] and split not in sources]
        apart = f"apart from the {' and '.join(taken)}, " if taken else ""
        raise ValueError(
            f"{rows.title}: {apart}none of its {rows.num_rows} rows can be used"
            f"{_counts(skipped, faults)}{_remedy(skipped, shape)}"
        )
    if data.num_train is not None and len(train) < data.num_train:
        raise ValueError(
            f"data.num_train: {data.num_train}: {rows.name} has only {len(train)} train rows that can be "
            f"used{_counts(skipped, faults)}; allowed: at most that many, or null for all{_remedy(skipped, shape)}"
        )
    return {"train": train, **splits}


def _source(rows: RowSource, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Source:
    if rows.num_rows == 0:
        raise ValueError(f"{rows.title}: has no rows")
    skips_bad_rows = data.on_bad_row == "skip"
    if rows.broken and (not skips_bad_rows or len(rows.broken) == rows.num_rows):
        index = min(rows.broken)
        remedy = "every row is like this" if len(rows.broken) == rows.num_rows else None
        raise row_error(rows, index, rows.broken[index], remedy=remedy)
    shape = recognise(rows, data)
    return Source(
        rows=rows,
        shape=shape,
        tokenizer=RowTokenizer(tokenizer, shape, data, title=rows.title),
        group_by=find_group_column(rows, data.group_by),
        skips_bad_rows=skips_bad_rows,
    )


def _draw(
    decks: Mapping[str, Deck], split: str, num_wanted: int, skipped: Counter[str], faults: RowFaults
) -> list[ChosenRow]:
    """Draw the rows of a split from its own source, or from few groups of the train source."""
    deck = decks.get(split, decks["train"])
    own = split in decks
    found = deck.take(num_wanted) if own else deck.take_from_few_groups(num_wanted, LARGEST_SHARE[split])
    if len(found) == num_wanted:
        return found
    rows = deck.source.rows
    deck.count_kept_apart()
    if not found:
        raise ValueError(
            f"{rows.title}: none of its {rows.num_rows} rows can be used"
            f"{_counts(skipped, faults)}{_remedy(skipped, deck.source.shape)}"
        )
    kind = {"evaluation": "", "test": "test "}[split]
    raise ValueError(
        f"data.{_KEYS[split]}: {num_wanted}: {rows.name} has only {len(found)} {kind}rows that can be "
        f"used{_counts(skipped, faults)}; allowed: at most that many; one fewer if the train rows come from the "
        f"same source{_remedy(skipped, deck.source.shape)}"
    )


def _counts(skipped: Counter[str], faults: RowFaults) -> str:
    """The skipped rows for an error message, such as " (skipped: 3 empty text)"; empty if there are none."""
    examples = faults.examples()
    counts = ", ".join(f"{count} {with_examples(reason, examples)}" for reason, count in sorted(skipped.items()))
    return f" (skipped: {counts})" if counts else ""


def _remedy(skipped: Counter[str], shape: Shape) -> str:
    """What to do if rows are missing because their groups are in other splits; empty if none are."""
    if not any(skipped[KEPT_APART[name]] for name in ("in_eval_group", "in_test_group")):
        return ""
    without = ""
    if shape.unused:
        unused = shown_columns(shape.unused)
        without = f"; if prompts are equal because they lack a column, write it into them (not used: {unused})"
    return (
        "; rows of one group (equal prompts, if data.group_by is null) are never in two splits: data.group_by can name "
        f"a column with more values{without}"
    )
