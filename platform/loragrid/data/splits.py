"""Chooses the rows of the evaluation, test and train splits; no row is in two of them."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loragrid.config.experiment import DataConfig
from loragrid.data.sources import RowSource, find_columns, open_eval_rows, open_test_rows, open_train_rows
from loragrid.data.tokenization import LabelledTokens, RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "evaluation", "test")
SAME_AS_EVAL, SAME_AS_TEST = "same as an eval row", "same as a test row"
MOST_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows and the tokenizer of their kind."""

    rows: RowSource
    tokenizer: RowTokenizer


def open_sources(data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Source]:
    """Split -> source; a split without its own source takes its rows out of the train source.

    Raises:
        ValueError: rows that cannot be found or read, or wrong columns.
    """
    opened = {"train": open_train_rows(data), "evaluation": open_eval_rows(data), "test": open_test_rows(data)}
    return {
        split: Source(rows=rows, tokenizer=_row_tokenizer(rows, data, tokenizer))
        for split, rows in opened.items()
        if rows is not None
    }


def choose_rows(
    data: DataConfig, sources: Mapping[str, Source], skipped: Counter[str]
) -> dict[str, list[LabelledTokens]]:
    """Draw eval rows, then test rows, then train rows, and tokenize only as many rows as needed.

    The splits of one source draw from it one after another, in one fixed order. `skipped` counts the rows that were
    read but not used, by reason.

    Raises:
        ValueError: there are too few usable rows.
    """
    deck = {split: permutation(source.rows.num_rows, _ORDERS[split]).tolist() for split, source in sources.items()}
    evaluation = _draw(data, sources, deck, "evaluation", data.num_eval, skipped, {})
    known = {row.input_ids: SAME_AS_EVAL for row in evaluation}
    test = _draw(data, sources, deck, "test", data.num_test, skipped, known) if data.num_test else []
    known |= {row.input_ids: SAME_AS_TEST for row in test}
    train, _ = _take(sources["train"], deck["train"], data.num_train, skipped, known)
    title, name = sources["train"].rows.title, sources["train"].rows.name
    if not train:
        taken = [f"{len(evaluation)} eval rows (data.num_eval)"] if "evaluation" not in sources else []
        taken += [f"{len(test)} test rows (data.num_test)"] if test and "test" not in sources else []
        apart = f"apart from the {' and '.join(taken)}, " if taken else ""
        raise ValueError(
            f"{title}: {apart}none of its {sources['train'].rows.num_rows} rows can be used{_counts(skipped)}"
        )
    if data.num_train is not None and len(train) < data.num_train:
        raise ValueError(
            f"data.num_train: {data.num_train}: {name} has only {len(train)} train rows that can be "
            f"used{_counts(skipped)}; allowed: at most that many, or null for all"
        )
    return {"train": train, "evaluation": evaluation, "test": test}


def permutation(num_rows: int, purpose: str) -> Tensor:
    """The numbers of all rows (num_rows,) in an order that depends only on the purpose."""
    seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7], "big")
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))


_ORDERS = {"train": "train rows", "evaluation": "eval rows", "test": "test rows"}
_KEYS = {"evaluation": "num_eval", "test": "num_test"}


def _row_tokenizer(rows: RowSource, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> RowTokenizer:
    if rows.num_rows == 0:
        raise ValueError(f"{rows.title}: has no rows")
    return RowTokenizer(
        tokenizer,
        find_columns(rows, data.columns),
        max_length=data.max_length,
        loss_on=data.loss_on,
        title=rows.title,
    )


def _draw(
    data: DataConfig,
    sources: Mapping[str, Source],
    deck: dict[str, list[int]],
    split: str,
    num_wanted: int,
    skipped: Counter[str],
    known: Mapping[tuple[int, ...], str],
) -> list[LabelledTokens]:
    """Draw the rows of a split from its source or the train source; removes the rows that it read from `deck`."""
    origin = split if split in sources else "train"
    rows = sources[origin].rows
    found, num_seen = _take(sources[origin], deck[origin], num_wanted, skipped, known)
    deck[origin] = deck[origin][num_seen:]
    if not found:
        raise ValueError(f"{rows.title}: none of its {rows.num_rows} rows can be used{_counts(skipped)}")
    if len(found) < num_wanted:
        kind = {"evaluation": "", "test": "test "}[split]
        raise ValueError(
            f"data.{_KEYS[split]}: {num_wanted}: {rows.name} has only {len(found)} {kind}rows that can be "
            f"used{_counts(skipped)}; allowed: at most that many; one fewer if the train rows come from the same source"
        )
    return found


def _take(
    source: Source,
    order: Sequence[int],
    num_wanted: int | None,
    skipped: Counter[str],
    known: Mapping[tuple[int, ...], str],
) -> tuple[list[LabelledTokens], int]:
    """The first `num_wanted` (None: all) usable rows in `order`, and the number of rows read for them.

    known: tokens of a row in another split -> the reason why it cannot be taken again.
    """
    taken: list[LabelledTokens] = []
    num_seen = 0
    while num_seen < len(order) and (num_wanted is None or len(taken) < num_wanted):
        num_missing = MOST_ROWS_AT_ONCE if num_wanted is None else num_wanted - len(taken)
        # Read no more rows than are missing: otherwise usable rows would be read and not taken.
        indices = order[num_seen : num_seen + min(num_missing, MOST_ROWS_AT_ONCE)]
        for row in source.tokenizer.tokenize(source.rows.read(indices), indices):
            if isinstance(row, str):
                skipped[row] += 1
            elif row.input_ids in known:
                skipped[known[row.input_ids]] += 1
            else:
                taken.append(row)
        num_seen += len(indices)
    return taken, num_seen


def _counts(skipped: Counter[str]) -> str:
    """The skipped rows for an error message, such as " (skipped: 3 empty text)"; empty if there are none."""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    return f" (skipped: {counts})" if counts else ""
