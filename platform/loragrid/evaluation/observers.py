"""Measurements besides the loss while a pack trains: the figures of a task, and the loss of held-out text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loragrid.data.labels import IGNORED
from loragrid.evaluation.kept_answers import KeptAnswers
from loragrid.evaluation.task_scorer import TaskScorer
from loragrid.training.batches import PackBatches
from loragrid.training.evaluate import score_row_by_row
from loragrid.training.step import PackModel, SumOverWorkers


@dataclass(frozen=True, kw_only=True)
class TaskFigures:
    """The task's figures on the evaluation rows: of the bare base once, at intervals, and after `last_step`.

    keep: receives the answers after `last_step`.
    """

    scorer: TaskScorer
    batches: PackBatches
    last_step: int
    keep: KeptAnswers | None = None
    phase: str = "generate"

    def is_due(self, step: int) -> bool:
        """As `Observation`."""
        task = self.scorer.task
        return task.base if step == 0 else step == self.last_step or bool(task.every and step % task.every == 0)

    def measure(self, model: PackModel, step: int, sum_over_workers: SumOverWorkers) -> Mapping[str, Tensor]:
        """As `Observation`."""
        keep = self.keep if step == self.last_step else None
        columns = self.scorer.score(model, self.batches, "eval", sum_over_workers, frozen=step == 0, keep=keep)
        figures = self.scorer.figures_of(columns)
        device = model.active.device
        return {
            f"eval/{name}": torch.tensor([own[name] for own in figures], dtype=torch.float64, device=device)
            for name in figures[0]
        }


@dataclass(frozen=True, kw_only=True)
class HeldOutTextLoss:
    """The loss of held-out text before the first step, along the way, and after `last_step`.

    Its increase measures forgetting. every: steps between two measurements; None: at every evaluation.
    evaluation_is_due: whether a step is evaluated.
    """

    batches: PackBatches
    last_step: int
    every: int | None
    evaluation_is_due: Callable[[int], bool]
    phase: str = "eval"

    def is_due(self, step: int) -> bool:
        """As `Observation`."""
        if step in (0, self.last_step):
            return True
        return self.evaluation_is_due(step) if self.every is None else step % self.every == 0

    def measure(self, model: PackModel, step: int, sum_over_workers: SumOverWorkers) -> Mapping[str, Tensor]:
        """As `Observation`."""
        rows = self.batches.data.held_out_text
        assert rows is not None, "there is a text"
        losses = score_row_by_row(model, self.batches, rows, sum_over_workers, frozen=step == 0)
        num_labels = int((rows.label_targets != IGNORED).sum())
        loss = losses.sum(1) / num_labels
        return {"forgetting/base_loss": loss, "forgetting/loss": loss} if step == 0 else {"forgetting/loss": loss}
