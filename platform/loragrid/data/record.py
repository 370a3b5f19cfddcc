"""What is recorded about rows: figures and tags of a data set, and figures of a training on it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loragrid.config.experiment import TrainingConfig
from loragrid.data.dataset import TokenizedData, batch_indices
from loragrid.data.in_words import DataRecord
from loragrid.data.labels import IGNORED
from loragrid.trials.skip_reasons import KEPT_APART, UNUSABLE
from loragrid.trials.tags import DATA_DIGEST_TAG, EXAMPLES_TAG, LEFT_OUT_TAG, MADE_FROM_TAG

SHOWN_DIGITS = 16


def data_figures(data: TokenizedData) -> dict[str, float]:
    """Metric key -> figure: rows and groups per split, rows left out by reason, overlap, tokens and labels."""
    found: dict[str, float] = {}
    for split, rows in (("train", data.train), ("eval", data.evaluation), ("test", data.test)):
        found |= {f"data/{split}_rows": len(rows), f"data/{split}_groups": rows.num_groups}
    num_used = sum(len(rows) for rows in (data.train, data.evaluation, data.test))
    skipped = {name: data.skipped[reason] for name, reason in UNUSABLE.items() if reason in data.skipped}
    apart = {name: data.skipped[reason] for name, reason in KEPT_APART.items() if reason in data.skipped}
    num_skipped, num_apart = sum(skipped.values()), sum(apart.values())
    assert num_skipped + num_apart == sum(data.skipped.values()), f"a reason is in no table: {data.skipped}"
    return {
        **found,
        "data/skipped_rows": num_skipped,
        "data/skipped_share": num_skipped / (num_skipped + num_used),
        "data/kept_apart_rows": num_apart,
        **{f"data/skipped_{name}": count for name, count in skipped.items()},
        **{f"data/kept_apart_{name}": count for name, count in apart.items()},
        **{f"data/noted_{name}": count for name, count in data.notes.items()},
        **{f"data/{name}": count for name, count in data.overlap.items()},
        "data/train_tokens": int(data.train.num_tokens.sum()),
        "data/train_labels": data.train.num_labels,
    }


def trained_figures(data: TokenizedData, training: TrainingConfig, seed: int) -> dict[str, float]:
    """Metric key -> figure: what all steps of a trial train, and how much of what they compute is padding."""
    rows = data.train
    trained = batch_indices(
        len(rows), training.num_steps * training.batch_size, seed, 0
    )  # all steps are one large batch
    num_tokens = int(rows.num_tokens[trained].sum())
    return {
        "data/trained_epochs": len(trained) / len(rows),
        "data/trained_tokens": num_tokens,
        "data/trained_labels": int((rows.label_targets != IGNORED).sum(1)[trained].sum()),
        "data/padding_share": 1 - num_tokens / (len(trained) * rows.input_ids.shape[1]),
    }


def data_record(data: TokenizedData, max_length: int) -> DataRecord:
    """What `plan` and `run` tell about the rows before training."""
    length = data.train.input_ids.shape[1]
    padding = 1 - int(data.train.num_tokens.sum()) / (length * len(data.train))
    return DataRecord.of(
        data_figures(data),
        data.skipped,
        max_length,
        examples=data.examples,
        read_as=data.made_from.get("shapes", {}),
        row_length=length,
        padding_share=(padding, padding),
    )


def data_tags(data: TokenizedData) -> dict[str, str]:
    """Tags that identify the rows, and say what they were made from and what was left out."""
    return {
        DATA_DIGEST_TAG: data.digest,
        MADE_FROM_TAG: json.dumps(shortened(data.made_from), sort_keys=True),
        LEFT_OUT_TAG: json.dumps(data.skipped, sort_keys=True),
        **({EXAMPLES_TAG: json.dumps(data.examples)} if data.examples else {}),
    }


def common_record(all_data: Sequence[TokenizedData]) -> tuple[dict[str, float], dict[str, str]]:
    """The figures and tags that the data sets of a sweep have in common; of one data set all of them."""
    first, *others = [(data_figures(data), data_tags(data)) for data in all_data]
    figures = {key: value for key, value in first[0].items() if all(other[0].get(key) == value for other in others)}
    return figures, {key: value for key, value in first[1].items() if all(o[1].get(key) == value for o in others)}


def shortened(value: Any) -> Any:
    """The value with long digests cut to `SHOWN_DIGITS` digits."""
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    is_digest = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:SHOWN_DIGITS] if is_digest else value
