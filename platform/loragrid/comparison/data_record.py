"""Reads what a sweep recorded about its rows: splits, groups, what was left out, and what the splits share."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loragrid.comparison.settings import tasks_of
from loragrid.comparison.table import Comparison, plain_value
from loragrid.formatting import count_of
from loragrid.trials.row_notes import ROW_NOTES
from loragrid.trials.skip_reasons import KEPT_APART, TOO_LONG
from loragrid.trials.tags import LEFT_OUT_TAG, MADE_FROM_TAG

MOST_SKIPPED = 0.05
"""If a larger share of the rows cannot be used, a claim is about the rows that remain."""
NOTED = "data/noted_"
SPLITS = {"train": "train", "eval": "evaluation", "test": "test"}
"""Split, as in metric keys -> its name in sentences."""


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """What is recorded about the rows of one data set.

    rows, groups: split (`train`, `eval`, `test`) -> number. skipped: reason -> rows that cannot be used. skipped_share:
    their share among skipped and used rows. kept_apart: reason -> usable rows that belong to no split. overlap: name of
    a count, such as `test_prompts_in_train` -> rows. train_tokens, train_labels: of one epoch. trained_tokens,
    trained_labels, padding_share: of a whole training, as (lowest, highest) over the trials; None if not recorded.
    notes: name in `ROW_NOTES` -> used rows about which it was noticed; empty in sweeps that recorded none.
    read_as: split -> the recognised shape of its source's rows, with the columns that are not used.
    """

    rows: Mapping[str, int]
    groups: Mapping[str, int]
    skipped: Mapping[str, int]
    skipped_share: float
    kept_apart: Mapping[str, int]
    overlap: Mapping[str, int]
    train_tokens: int
    train_labels: int
    max_length: int | None = None
    trained_tokens: tuple[float, float] | None = None
    trained_labels: tuple[float, float] | None = None
    padding_share: tuple[float, float] | None = None
    notes: Mapping[str, int] = field(default_factory=dict)
    read_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_partial(self) -> bool:
        """Whether so many rows cannot be used that a claim is about the others only."""
        return self.skipped_share > MOST_SKIPPED

    def size_sentence(self) -> str:
        """How many rows each split has, and how much of the computed positions is padding."""
        sizes = ", ".join(f"{self.rows[split]:,} {name}" for split, name in SPLITS.items() if self.rows[split])
        if self.padding_share is None:
            return f"Rows: {sizes}."
        low, high = (_percent(share) for share in self.padding_share)
        return f"Rows: {sizes}; {low if low == high else f'{low} to {high}'} of the positions are padding."

    def sentences(self) -> list[str]:
        """Plain sentences: as what rows are read, what was left out, dependent rows, notes, and what splits share."""
        return [
            *self.shape_sentences(),
            *self.left_out_sentences(),
            *self.group_sentences(),
            *self.note_sentences(),
            *self.overlap_sentences(),
        ]

    def shape_sentences(self) -> list[str]:
        """As what the rows are read, of each source that is read otherwise than the train rows."""
        train = self.read_as.get("train")
        if train is None:
            return []
        others = {split: shape for split, shape in self.read_as.items() if shape != train}
        found = f"The rows are read as {train}."
        return [found, *(f"The {split} rows are read as {shape}." for split, shape in others.items())]

    def left_out_sentences(self) -> list[str]:
        """The rows that cannot be used, with their share and reasons, and what this means for a claim."""
        if not self.skipped:
            return []
        reasons = ", ".join(f"{count:,} {self._reason(reason)}" for reason, count in self.skipped.items())
        found = [f"{_percent(self.skipped_share)} of the rows read were left out: {reasons}."]
        return [*found, "The verdict speaks of the rows that remain."] if self.is_partial else found

    def group_sentences(self) -> list[str]:
        """How many groups the evaluation and test rows form, if fewer than rows; the rows that groups cost."""
        found = [
            f"The {self.rows[split]:,} {SPLITS[split]} rows form {count_of(self.groups[split], 'group')}."
            for split in ("eval", "test")
            if self.groups[split] < self.rows[split]
        ]
        num_apart = sum(self.kept_apart.values())
        if num_apart:
            found.append(
                f"{num_apart:,} usable {'row belongs' if num_apart == 1 else 'rows belong'} to no split, because the "
                "evaluation or test rows hold the same row or others of its group."
            )
        return found

    def note_sentences(self) -> list[str]:
        """What was noticed about rows that are used, each with their number."""
        total = sum(self.rows.values())
        return [
            f"Noticed about {self.notes[name]:,} of the {total:,} rows used: they {what}."
            for name, what in ROW_NOTES.items()
            if self.notes.get(name)
        ]

    def overlap_sentences(self) -> list[str]:
        """What evaluation and test rows share with train rows, if anything."""
        found = []
        for split in ("eval", "test"):
            number = self.rows[split]
            shared = [
                f"{self.overlap[name]:,} {'has' if self.overlap[name] == 1 else 'have'} {what}"
                for name, what in (
                    (f"{split}_prompts_in_train", "a prompt of a train row"),
                    (f"{split}_prompts_in_train_answers", "a question that is an answer in train"),
                    (f"{split}_answers_in_train", "an answer that is an answer in train"),
                    (f"{split}_answers_in_train_prompts", "an answer that is a question in train"),
                )
                if self.overlap.get(name)
            ]
            if shared:
                found.append(f"Of the {number:,} {SPLITS[split]} rows, {_listed(shared)}.")
        return found

    def to_dict(self) -> dict[str, object]:
        """The record as JSON can hold it."""
        return {**asdict(self), "sentences": self.sentences()}

    def _reason(self, reason: str) -> str:
        return f"{reason} ({self.max_length} tokens)" if reason == TOO_LONG and self.max_length else reason

    @classmethod
    def of(
        cls, figures: Mapping[str, float], left_out: Mapping[str, int], max_length: int | None = None, **trained: Any
    ) -> "DataRecord":
        """The record from metrics by key (`data/...`) and from the tag `LEFT_OUT_TAG`. trained: further fields."""
        return cls(
            rows={split: int(figures[f"data/{split}_rows"]) for split in SPLITS},
            groups={split: int(figures[f"data/{split}_groups"]) for split in SPLITS},
            skipped={reason: count for reason, count in left_out.items() if reason not in KEPT_APART.values()},
            skipped_share=float(figures["data/skipped_share"]),
            kept_apart={reason: count for reason, count in left_out.items() if reason in KEPT_APART.values()},
            overlap={key.removeprefix("data/"): int(value) for key, value in figures.items() if "_in_train" in key},
            train_tokens=int(figures["data/train_tokens"]),
            train_labels=int(figures["data/train_labels"]),
            max_length=max_length,
            notes={
                key.removeprefix(NOTED): int(value) for key, value in figures.items() if key.startswith(NOTED) and value
            },
            **trained,
        )


def data_record_of(comparison: Comparison) -> DataRecord | None:
    """The record of a sweep's rows; None if they are not recorded, or if the sweep has several data sets or models.

    Use `data_records_of`, or `tasks_of` first, for a sweep over several.
    """
    return data_records_of(comparison).get("")


def data_records_of(comparison: Comparison) -> dict[str, DataRecord]:
    """Label of a task (see `tasks_of`) -> the record of its rows; tasks without a record are left out."""
    found = {label: _record_of(part) for label, part in tasks_of(comparison).items()}
    return {label: record for label, record in found.items() if record is not None}


def _record_of(comparison: Comparison) -> DataRecord | None:
    if "data/train_rows" not in comparison.table:
        return None
    recorded = comparison.table[comparison.table["data/train_rows"].notna()]
    if recorded.empty:
        return None
    first = recorded.iloc[0]
    values = {str(key): plain_value(first[key]) for key in recorded.columns if str(key).startswith("data/")}
    tags = comparison.tags.get(str(first["trial_id"]), {})
    length = comparison.sweep_parameters.get("data.max_length") or plain_value(first.get("max_length"))
    trained = {
        name: (float(recorded[f"data/{name}"].min()), float(recorded[f"data/{name}"].max()))
        for name in ("trained_tokens", "trained_labels", "padding_share")
        if f"data/{name}" in recorded
    }
    return DataRecord.of(
        {key: value for key, value in values.items() if value is not None},
        json.loads(tags.get(LEFT_OUT_TAG, "{}")),
        int(length) if length else None,
        read_as=json.loads(tags.get(MADE_FROM_TAG, "{}")).get("shapes", {}),
        **trained,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "Less than 1 %"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
