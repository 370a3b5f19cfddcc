"""The contract of a task kind: what it declares and implements, and how it reads rows and uses a pack's members.

A kind is one file in `tasks/kinds`, whose name is the kind's name. The file holds a subclass of `TaskConfig` (the keys
of the `task:` section, with their checks) and a subclass of `Scorer` (the score of every row). The room `evaluation`
implements `Rows` and `Members`. A kind's file imports torch only inside functions, because every experiment imports
the file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from loragrid.schema.fields import OptionalCount, Section, Switch, Unit

if TYPE_CHECKING:
    from torch import Tensor

TASK_OBSERVATION_KEYS = frozenset({"every", "base"})
"""Task keys that decide when rows are scored, not the final scores; not in a trial's identity."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure that a kind computes from the scores of all rows of a split.

    name: the metric keys are `eval/<name>` and `test/<name>`. description: what it measures; `{rows}` is replaced by
    the split's rows. axis: the label of a chart's axis. is_proportion: whether it is a share of rows, from 0 to 1; then
    it is shown in per cent, and its column holds 0 or 1 for every row. column: the row column whose mean it is; None if
    it is not such a mean, and then it is not tested over rows.
    """

    name: str
    description: str
    axis: str
    higher_is_better: bool = True
    is_proportion: bool = False
    column: str | None = None

    @property
    def words(self) -> str:
        """The name as a reader sees it."""
        return self.name.replace("_", " ")


ACCURACY = Figure(
    name="accuracy",
    description="share of the {rows} rows that are answered right",
    axis="rows answered right",
    is_proportion=True,
    column="correct",
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row as a task sees it: the tokens before its last answer, and the answer's tokens including the end token.

    key: the row's digest.
    """

    key: str
    prompt: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are generated. temperature None is greedy decoding; top_p and seed apply only with a temperature."""

    max_new_tokens: int
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0


class Rows(Protocol):
    """The rows of an experiment, as a kind may read them before training."""

    @property
    def questions(self) -> Mapping[str, Sequence[Question]]:
        """The questions of the splits that are scored: `eval` and `test`."""

    def train_questions(self) -> Sequence[Question]:
        """The questions of the train rows, built again at every call."""

    def text(self, tokens: Sequence[int]) -> str:
        """The decoded tokens, without the start and the end tokens around them; other special tokens are text."""

    def completions(self, question: Question, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each text as this question's completion.

        They are what training would make of it: with the blanks around it and the end that the row's own completion
        has, and cut as behind the row's prompt. The row's own text gives the row's own reference.
        """


class Members(Protocol):
    """M members of a pack, or the bare base (M = 1), answering N questions. All workers get the same results."""

    def generate(
        self,
        questions: Sequence[Question],
        generation: Generation,
        score: Callable[[int, str], Mapping[str, float]],
        columns: Sequence[str],
    ) -> "dict[str, Tensor]":
        """Let every member answer every question with generated text.

        score: question number, text -> a value for each of `columns`. Returns column -> values (M, N) float64.
        """

    def losses(self, questions: Sequence[Question], completions: Sequence[Sequence[Sequence[int]]]) -> "Tensor":
        """Cross-entropy (nats) of each question's own K completions, summed over their tokens: (M, N, K)."""


class Scorer(ABC):
    """Scores the rows of one experiment for a kind.

    answer_tokens: the most tokens that an answer adds to its prompt.
    """

    answer_tokens: int

    @abstractmethod
    def score(self, members: Members, split: str) -> "Mapping[str, Tensor]":
        """Row column -> a value for every member and every row of the split, (M, N) float64."""

    def tags(self) -> dict[str, str]:
        """Tags of every trial, in addition to the decoding."""
        return {}


class TaskConfig(Section, ABC):
    """The `task:` section of an experiment file: the keys of all kinds, and what a kind declares.

    figures: what is computed from the row scores; the first one ranks trials. former_keys: keys of other kinds, with
    their defaults, that are added to dumps of this kind. Trial ids are digests of dumps and must not change, although
    these keys once belonged to all kinds. A new kind has none.
    """

    figures: ClassVar[tuple[Figure, ...]]
    former_keys: ClassVar[Mapping[str, object]] = {}

    kind: str
    every: Annotated[OptionalCount, Unit("optimizer steps")] = Field(
        default=None,
        description="Steps between two scorings of the evaluation rows; null scores them only before the first and "
        "after the last step (test rows are scored once, after the last).",
        examples=[100],
    )
    base: Switch = Field(
        default=True, description="Whether the bare base is scored before the first step.", examples=[False]
    )

    @property
    @abstractmethod
    def decoding(self) -> str:
        """How answers are made, in words for the record. A model's own generation settings are never used."""

    @property
    def generation(self) -> Generation | None:
        """How answers are generated; None for a kind that generates no text."""
        return None

    @abstractmethod
    def scorer(self, rows: Rows) -> Scorer:
        """The scorer of these rows.

        Raises:
            ValueError: rows that the task cannot score; the message names the key, what is wrong and what is allowed.
        """

    def compute_figures(self, columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Figure name -> value, from the row columns of one member; by default the mean of the figure's column."""
        found = {}
        for figure in self.figures:
            assert figure.column is not None, f"{figure.name} is no mean: override compute_figures"
            values = columns[figure.column]
            found[figure.name] = sum(values) / len(values)
        return found

    def parameters(self) -> dict[str, str | int | float | bool | None]:
        """Key -> value, as MLflow records them; a tuple becomes text with commas."""
        values = {key: getattr(self, key) for key in type(self).model_fields}
        return {key: ",".join(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def is_changed(self, key: str) -> bool:
        """Whether the key's value differs from its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @model_serializer(mode="wrap")
    def _with_former_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {**dump(self), **self.former_keys}
