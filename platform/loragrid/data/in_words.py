"""Says in sentences what is known about the rows of a data set, from its figures: for plan, run and report alike."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loragrid.data.bad_rows import Examples, with_examples
from loragrid.formatting import count_of
from loragrid.trials.row_notes import ROW_NOTES
from loragrid.trials.skip_reasons import KEPT_APART, TOO_LONG

MOST_SKIPPED = 0.05
"""If a larger share of the rows cannot be used, a claim is about the rows that remain."""
SPLITS = {"train": "train", "eval": "evaluation", "test": "test"}
"""Split, as in metric keys -> its name in sentences."""
REMAINING = "The verdict speaks of the rows that remain."
_NOTED = "data/noted_"


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """What is recorded about the rows of one data set.

    rows, groups: split (`train`, `eval`, `test`) -> number. skipped: reason -> rows that cannot be used. examples:
    see `Examples`. skipped_share: their share among skipped and used rows. kept_apart: reason -> usable rows that
    belong to no split. overlap: name of a count, such as `test_prompts_in_train` -> rows. notes: name in
    `ROW_NOTES` -> used rows. train_tokens, train_labels: of one epoch. read_as: split -> the recognised shape of
    its source's rows. row_length: the positions that are computed for every row, padding included; None if not
    recorded. trained_tokens, trained_labels, trained_epochs, padding_share: of a whole training, as (lowest,
    highest) over the trials (of a plan: the padding of one epoch); None if not recorded.
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
    examples: Examples = field(default_factory=dict)
    read_as: Mapping[str, str] = field(default_factory=dict)
    row_length: int | None = None
    notes: Mapping[str, int] = field(default_factory=dict)
    trained_tokens: tuple[float, float] | None = None
    trained_labels: tuple[float, float] | None = None
    trained_epochs: tuple[float, float] | None = None
    padding_share: tuple[float, float] | None = None

    @property
    def is_partial(self) -> bool:
        """Whether so many rows cannot be used that a claim is about the others only."""
        return self.skipped_share > MOST_SKIPPED

    def lines(self) -> list[str]:
        """What `plan` and `run` print about the rows before anything is trained."""
        share = f"{_percent(self.skipped_share)} of the rows read cannot be used. {REMAINING}"
        partial = [share] if self.is_partial else []
        told = [*self.group_sentences(), *self.note_sentences(), *self.overlap_sentences()]
        return [self._used_line(), *partial, self._token_line(), *self.shape_sentences(), *told]

    def _used_line(self) -> str:
        """The rows of each split with their share of all used rows, the skipped rows by reason, and the shape."""
        num_used = sum(self.rows.values())
        shares = [
            f"{count_of(number, 'row') if split == 'train' else f'{number:,}'} {what} ({_share(number / num_used)})"
            for split, what in (("train", "to train on"), ("eval", "to evaluate"), ("test", "to test"))
            if (number := self.rows[split]) or split != "test"
        ]
        reasons = ", ".join(f"{count:,} {self._reason(reason)}" for reason, count in self._left_out().items() if count)
        skipped = f"; skipped {reasons}" if reasons else ""
        return f"{', '.join(shares)}{skipped}"

    def _left_out(self) -> dict[str, int]:
        return {**self.skipped, **self.kept_apart}

    def _token_line(self) -> str:
        """The tokens and labels of one epoch, and the share of padding among what is computed."""
        tokens = f"{self.train_tokens:,} tokens to train on in an epoch, {self.train_labels:,} of them labels"
        if self.row_length is None or self.padding_share is None:
            return tokens
        padding = _share(self.padding_share[0])
        return f"{tokens}; rows are padded to {self.row_length:,} tokens: {padding} of the positions are padding"

    def note_sentences(self) -> list[str]:
        """What was noticed about rows that are used, each with their number."""
        total = sum(self.rows.values())
        return [
            f"Noticed about {self.notes[name]:,} of the {total:,} rows used: they {what}."
            for name, what in ROW_NOTES.items()
            if self.notes.get(name)
        ]

    def size_sentence(self) -> str:
        """How many rows each split has, and how much of the computed positions is padding."""
        sizes = ", ".join(f"{self.rows[split]:,} {name}" for split, name in SPLITS.items() if self.rows[split])
        epochs = f"; trained for {_span(self.trained_epochs, _epochs)}" if self.trained_epochs else ""
        padding = f"; {_span(self.padding_share, _percent)} of the positions are padding" if self.padding_share else ""
        return f"Rows: {sizes}{epochs}{padding}."

    def sentences(self) -> list[str]:
        """Plain sentences: what was left out, what was noticed, dependent rows, and what splits share with train."""
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
        return [*found, REMAINING] if self.is_partial else found

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
        if reason == TOO_LONG and self.max_length:
            return f"{reason} ({self.max_length} tokens)"
        return with_examples(reason, self.examples)

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
                key.removeprefix(_NOTED): int(value)
                for key, value in figures.items()
                if key.startswith(_NOTED) and value
            },
            **trained,
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "Less than 1 %"


def _epochs(number: float) -> str:
    return f"{number:.3g} {'epoch' if number == 1 else 'epochs'}"


def _span(span: tuple[float, float], shown: Callable[[float], str]) -> str:
    low, high = shown(span[0]), shown(span[1])
    return low if low == high else f"{low} to {high}"


def _share(share: float) -> str:
    """As `_percent`, within a sentence."""
    return "0 %" if share == 0 else _percent(share).lower()


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
