"""What is looked at beside the loss while a pack trains: accuracy on a task, and what the adapters forget."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loragrid.data.labels import IGNORED
from loragrid.evaluation.tasks import TaskScorer
from loragrid.training.batches import PackBatches
from loragrid.training.evaluate import score_rows_alone
from loragrid.training.step import PackModel, SumOverWorkers


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The share of evaluation rows answered right: of the bare base once, every so often, and after `last_step`."""

    scorer: TaskScorer
    batches: PackBatches
    last_step: int
    phase: str = "generate"

    def is_due(self, step: int) -> bool:
        """As `Observation`."""
        task = self.scorer.task
        return task.base if step == 0 else step == self.last_step or bool(task.every and step % task.every == 0)

    def measure(self, model: PackModel, step: int, sum_over_workers: SumOverWorkers) -> Mapping[str, Tensor]:
        """As `Observation`."""
        right = self.scorer.correct(model, self.batches, "eval", sum_over_workers, frozen=step == 0)
        return {"eval/accuracy": right.mean(1)}


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The loss of a plain text before the first step and after `last_step`: the difference is what was forgotten."""

    batches: PackBatches
    last_step: int
    phase: str = "eval"

    def is_due(self, step: int) -> bool:
        """As `Observation`."""
        return step in (0, self.last_step)

    def measure(self, model: PackModel, step: int, sum_over_workers: SumOverWorkers) -> Mapping[str, Tensor]:
        """As `Observation`."""
        rows = self.batches.data.forgetting
        assert rows is not None, "there is a text"
        losses = score_rows_alone(model, self.batches, rows, sum_over_workers, frozen=step == 0)
        num_labels = int((rows.label_targets != IGNORED).sum())
        return {"forgetting/base_loss" if step == 0 else "forgetting/loss": losses.sum(1) / num_labels}
