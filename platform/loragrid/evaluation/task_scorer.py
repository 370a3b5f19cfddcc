"""Scores every member of a pack on the rows of a task of any kind."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from loragrid.config.experiment import ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.evaluation.kept_answers import KeptAnswers
from loragrid.evaluation.pack_members import PackMembers
from loragrid.evaluation.questions import TokenizedQuestions
from loragrid.models.loading import load_tokenizer, max_context
from loragrid.tasks.contract import TaskConfig
from loragrid.training.batches import PackBatches
from loragrid.training.step import PackModel, SumOverWorkers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def task_scorer(task: TaskConfig, model: ModelConfig, data: TokenizedData) -> "TaskScorer":
    """The scorer of a task on tokenized rows; raises ValueError as `TaskScorer`."""
    return TaskScorer(task, load_tokenizer(model), data, max_context(model))


class TaskScorer:
    """Scores packs on the evaluation and the test rows of one experiment.

    longest_prompt: in tokens. longest_row: a prompt and its answer, in tokens. num_questions: of the larger split.

    Raises:
        ValueError: rows without a prompt, rows that the kind cannot score, or prompts that leave no room for an answer
            in the model's context of `context` tokens (None: no limit).
    """

    def __init__(
        self, task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", data: TokenizedData, context: int | None
    ) -> None:
        self.task, self._tokenizer = task, tokenizer
        self._rows = TokenizedQuestions(tokenizer, data)
        self.questions = self._rows.questions
        for split, questions in self.questions.items():
            if questions and all(len(question.prompt) == 1 for question in questions):
                what = f"the {split} rows have no prompt to answer (rows of text, or loss_on: all)"
                raise ValueError(f"task.kind: {task.kind}: {what}; allowed: rows with a prompt, or no task")
        self.end_token_ids = self._rows.end_token_ids()
        self._scorer = task.scorer(self._rows)
        room = self._scorer.answer_tokens
        self.longest_prompt = max(len(question.prompt) for found in self.questions.values() for question in found)
        self.longest_row = self.longest_prompt + room
        self.num_questions = max(len(questions) for questions in self.questions.values())
        if context is not None and self.longest_row > context:
            key = f"task.kind: {task.kind}" if task.generation is None else f"task.max_new_tokens: {room}"
            longest = self.longest_prompt
            what = f"the longest prompt has {longest} tokens, an answer up to {room}, the model's context {context}"
            raise ValueError(f"{key}: {what}; allowed: at most {context - longest}, or a smaller data.max_length")

    def tags(self) -> dict[str, str]:
        """How answers were generated, as MLflow tags."""
        ends = ", ".join(f"{self._tokenizer.convert_ids_to_tokens(end)!r}" for end in self.end_token_ids)
        stops = "" if self.task.generation is None else f", ends at {ends or 'no token'}"
        return {"loragrid.decoding": f"{self.task.decoding}{stops}", **self._scorer.tags()}

    def score(
        self,
        model: PackModel,
        batches: PackBatches,
        split: str,
        sum_over_workers: SumOverWorkers,
        *,
        frozen: bool = False,
        keep: KeptAnswers | None = None,
    ) -> Mapping[str, Tensor]:
        """Row column -> the value of every row of the split for every member, (M, N) float64, the same in every worker.

        frozen: the values of the bare base, (1, N). keep: receives the generated answers to some of the questions.
        """
        pad = self._tokenizer.pad_token_id
        assert pad is not None, "load_tokenizer sets a pad token"
        members = PackMembers(
            model=model,
            batches=batches,
            sum_over_workers=sum_over_workers,
            frozen=frozen,
            end_token_ids=self.end_token_ids,
            pad_token_id=int(pad),
            text=self._rows.text,
            keep=keep,
        )
        return self._scorer.score(members, split)

    def figures_of(self, columns: Mapping[str, Tensor]) -> list[dict[str, float]]:
        """Figure name -> value over all rows, for each of the M members of the columns (M, N)."""
        by_member = {name: values.tolist() for name, values in columns.items()}
        num_members = len(next(iter(by_member.values())))
        return [
            self.task.compute_figures({name: values[member] for name, values in by_member.items()})
            for member in range(num_members)
        ]
