"""label_likelihood: a row is answered with the likeliest of a few completions (labels), without generation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from loragrid.schema.errors import ExperimentError, Problem
from loragrid.schema.fields import Allowed, Text
from loragrid.tasks.contract import ACCURACY, Figure, Members, Question, Rows, Scorer, TaskConfig

if TYPE_CHECKING:
    from torch import Tensor

MAX_LABELS = 256
"""Most labels. Each row is scored with every label, and rows with more different completions hold free text."""

MAX_SHOWN_LABELS = 20


class LabelLikelihood(TaskConfig):
    """The prompt is answered with the likeliest of `labels`, by default of all completions that the rows have."""

    figures: ClassVar[tuple[Figure, ...]] = (ACCURACY,)
    former_keys: ClassVar[Mapping[str, object]] = {
        **dict.fromkeys(("answer_after", "answer_pattern", "temperature", "top_p")),
        "answer_at": "last",
        "normalise": "text",
        "max_new_tokens": 256,
        "seed": 0,
    }

    kind: Literal["label_likelihood"] = Field(
        default="label_likelihood",
        description="A row is answered with the likeliest of a few completions.",
        examples=["label_likelihood"],
    )
    labels: Annotated[
        tuple[Text, ...] | None, Field(min_length=2), Allowed("a list of at least two completions, or null")
    ] = Field(
        default=None,
        description="Completions to choose from; null uses all that the rows have.",
        examples=[["positive", "negative"]],
    )
    likelihood: Annotated[Literal["summed", "per_token"], Allowed("summed, per_token")] = Field(
        default="summed",
        description="Log-likelihood of a completion: summed over its tokens, or their mean (per_token).",
        examples=["per_token"],
    )

    @property
    def decoding(self) -> str:
        """As `TaskConfig`."""
        return f"the likeliest completion, log-likelihood {self.likelihood.replace('_', ' ')}"

    @model_validator(mode="after")
    def _check_labels(self) -> "LabelLikelihood":
        if self.labels is not None and len({label.strip() for label in self.labels}) < len(self.labels):
            what = "a label occurs twice (blanks around it do not count)"
            raise ExperimentError([Problem(key="labels", value=self.labels, what=what, allowed="every label once")])
        return self

    def scorer(self, rows: Rows) -> "LabelLikelihoodScorer":
        """As `TaskConfig`."""
        return LabelLikelihoodScorer(self, rows)


class LabelLikelihoodScorer(Scorer):
    """Compares the likeliest label with the row's own.

    Raises:
        ValueError: too few or too many different completions, or labels that do not fit them.
    """

    def __init__(self, task: LabelLikelihood, rows: Rows) -> None:
        self._task, self._rows = task, rows
        self._labels = self._find_labels()
        self._completions = {
            split: [rows.completions(question, self._labels) for question in questions]
            for split, questions in rows.questions.items()
        }
        self.answer_tokens = max(
            len(tokens) for of_split in self._completions.values() for of_row in of_split for tokens in of_row
        )

    def score(self, members: Members, split: str) -> "Mapping[str, Tensor]":
        """As `Scorer`: the column `correct` holds 1 where the likeliest label is the row's, otherwise 0."""
        questions, completions = self._rows.questions[split], self._completions[split]
        losses = members.losses(questions, completions)
        if self._task.likelihood == "per_token":
            losses = losses / losses.new_tensor([[len(tokens) for tokens in of_row] for of_row in completions])
        predicted = losses.argmin(-1)
        own = predicted.new_tensor([self._labels.index(self._label_of(question)) for question in questions])
        return {"correct": (predicted == own).double()}

    def _label_of(self, question: Question) -> str:
        return self._rows.text(question.reference).strip()

    def _find_labels(self) -> list[str]:
        """The labels in the order of `task.labels`, or all, sorted."""
        scored = self._rows.questions
        questions = (*self._rows.train_questions(), *scored["eval"], *scored["test"])
        found = sorted({self._label_of(question) for question in questions})
        if self._task.labels is not None:
            return self._wanted([label.strip() for label in self._task.labels], found)
        if not 2 <= len(found) <= MAX_LABELS:
            what = f"the rows have {len(found)} different completions"
            allowed = f"from 2 to {MAX_LABELS}, task.labels, or a kind that generates answers"
            raise ValueError(f"task.kind: {self._task.kind}: {what}; allowed: {allowed}")
        return found

    def _wanted(self, wanted: list[str], found: Sequence[str]) -> list[str]:
        if unknown := [label for label in wanted if label not in found]:
            shown = _shown(found)
            raise ValueError(f"task.labels: {unknown[0]!r}: no row has this completion; allowed: {shown}")
        for split, questions in self._rows.questions.items():
            for question in questions:
                if (label := self._label_of(question)) not in wanted:
                    what = f"the completion {label!r} of a row among the {split} rows is none of the labels"
                    raise ValueError(f"task.labels: {what}; allowed: a list of all completions, or null")
        return wanted


def _shown(labels: Sequence[str]) -> str:
    more = len(labels) - MAX_SHOWN_LABELS
    text = ", ".join(repr(label) for label in labels[:MAX_SHOWN_LABELS])
    return f"{text} and {more} more" if more > 0 else text
