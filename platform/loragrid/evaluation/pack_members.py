"""Lets the members of a pack answer a task's questions: in chunks that fit in memory, shared among the workers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loragrid.data.dataset import pad_rows
from loragrid.data.labelled_tokens import LabelledTokens
from loragrid.evaluation.generation import Decoding, generate
from loragrid.evaluation.kept_answers import KeptAnswers
from loragrid.models.sharding import is_sharded
from loragrid.tasks.contract import Generation, Question
from loragrid.training.batches import PackBatches
from loragrid.training.evaluate import score_in_chunks, score_row_by_row
from loragrid.training.step import PackModel, SumOverWorkers, one_worker


@dataclass(frozen=True, kw_only=True)
class PackMembers:
    """The members of a pack (or with `frozen` the bare base): the `Members` of a task kind.

    keep: receives the generated answers to some of the questions.
    """

    model: PackModel
    batches: PackBatches
    sum_over_workers: SumOverWorkers
    frozen: bool
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    text: Callable[[Sequence[int]], str]
    keep: KeptAnswers | None = None

    def generate(
        self,
        questions: Sequence[Question],
        generation: Generation,
        score: Callable[[int, str], Mapping[str, float]],
        columns: Sequence[str],
    ) -> dict[str, Tensor]:
        """As `Members`."""
        decoding = Decoding(
            max_new_tokens=generation.max_new_tokens,
            end_token_ids=self.end_token_ids,
            pad_token_id=self.pad_token_id,
            temperature=generation.temperature,
            top_p=generation.top_p,
            seed=generation.seed,
        )
        # A worker that holds the whole base generates without waiting for the others.
        together = self.sum_over_workers if is_sharded(self.model.base) else one_worker
        values = score_in_chunks(
            self.model, self.batches.answering, lambda: self._own_scores(questions, decoding, score, columns, together)
        )
        self.sum_over_workers(values)
        if self.keep is not None:
            self.keep.share(self.sum_over_workers)
        return dict(zip(columns, values, strict=True))

    def losses(self, questions: Sequence[Question], completions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """As `Members`."""
        pairs = [
            (question.prompt, tuple(tokens))
            for question, own in zip(questions, completions, strict=True)
            for tokens in own
        ]
        rows = [
            LabelledTokens((*prompt, *answer), tuple(range(len(prompt) - 1, len(prompt) + len(answer) - 1)))
            for prompt, answer in pairs
        ]
        padded = pad_rows(rows, self.pad_token_id)
        losses = score_row_by_row(self.model, self.batches, padded, self.sum_over_workers, frozen=self.frozen)
        return losses.view(len(losses), len(questions), -1)

    def _own_scores(
        self,
        questions: Sequence[Question],
        decoding: Decoding,
        score: Callable[[int, str], Mapping[str, float]],
        columns: Sequence[str],
        together: SumOverWorkers,
    ) -> Tensor:
        """The scores of this worker's questions (columns, M, N), zero for those of other workers.

        together: sums over the workers that must take every step of the generation together.
        """
        num_members, device = 1 if self.frozen else self.model.pack.num_members, self.model.active.device
        values = torch.zeros(len(columns), num_members, len(questions), dtype=torch.float64, device=device)
        answering = self.batches.answering
        if self.keep is not None:
            self.keep.begin(num_members, decoding.max_new_tokens, device)
        for start in answering.starts(len(questions)):
            # Past the end, a worker answers the first question and drops the answer, because all must take part.
            numbers = list(range(start, min(start + answering.size, len(questions)))) or [0]
            generated = generate(
                self.model,
                [questions[number].prompt for number in numbers],
                [questions[number].key for number in numbers],
                decoding,
                together,
                frozen=self.frozen,
            )
            for member, rows in enumerate(generated):
                for number, tokens in zip(numbers if start < len(questions) else (), rows, strict=False):
                    found = score(number, self.text(tokens))
                    for column, name in enumerate(columns):
                        values[column, member, number] = found[name]
                    if self.keep is not None:
                        self.keep.add(member, questions[number].key, tokens)
        return values
