"""Keeps the members' answers to a few questions while a task scores all of its questions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loragrid.training.step import SumOverWorkers


@dataclass(kw_only=True)
class KeptAnswers:
    """The answers to the questions with these keys; a later scoring replaces those of an earlier one.

    keys: of the K wanted questions. tokens (M, K, 1 + T) int64: the answer's length plus one, then its tokens; all
    zero for a question that this worker has not answered, so that a sum over workers completes them.
    """

    keys: tuple[str, ...]
    tokens: Tensor | None = None

    def begin(self, num_members: int, max_new_tokens: int, device: torch.device) -> None:
        """Forget what was kept; answers of `num_members` members follow."""
        shape = (num_members, len(self.keys), 1 + max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, member: int, key: str, answer: Sequence[int]) -> None:
        """Keep an answer if its question is wanted."""
        assert self.tokens is not None, "begin comes first"
        if key in self.keys:
            found = torch.tensor([len(answer) + 1, *answer])
            self.tokens[member, self.keys.index(key), : len(found)] = found.to(self.tokens.device)

    def share(self, sum_over_workers: SumOverWorkers) -> None:
        """Give every worker the answers of all workers."""
        assert self.tokens is not None, "begin comes first"
        sum_over_workers(self.tokens)

    def answers(self) -> list[list[list[int]]] | None:
        """[member][question] -> tokens; None unless every member has answered every question."""
        if self.tokens is None or not bool(self.tokens[:, :, 0].all()):
            return None
        return [[row[1 : row[0]] for row in of_member] for of_member in self.tokens.tolist()]
