"""What a pack's members are scored on beside their loss on the evaluation rows: a task, a plain text, the test rows."""

from collections.abc import Mapping

from loragrid.evaluation.observers import Accuracy, Forgetting
from loragrid.evaluation.row_scores import RowScores
from loragrid.evaluation.tasks import TaskScorer
from loragrid.training.batches import PackBatches
from loragrid.training.evaluate import score_rows_alone
from loragrid.training.loop import Observation
from loragrid.training.meters import Stopwatch
from loragrid.training.step import PackModel, SumOverWorkers


class PackScoring:
    """Scores a pack whose training ends at `last_step` on its `batches`; `task`: the scorer of its task, if any.

    `stopwatch` counts what is scored on the test rows as `eval`, and the task's answers as `generate`.
    """

    def __init__(
        self,
        batches: PackBatches,
        task: TaskScorer | None,
        *,
        last_step: int,
        sum_over_workers: SumOverWorkers,
        stopwatch: Stopwatch,
    ) -> None:
        self._batches, self._task, self._last_step = batches, task, last_step
        self._sum_over_workers, self._stopwatch = sum_over_workers, stopwatch

    def observations(self) -> list[Observation]:
        """What the training loop is to look at beside training and evaluation."""
        found: list[Observation] = []
        if self._task is not None:
            found.append(Accuracy(scorer=self._task, batches=self._batches, last_step=self._last_step))
        if self._batches.data.forgetting is not None:
            found.append(Forgetting(batches=self._batches, last_step=self._last_step))
        return found

    def tags(self) -> Mapping[str, str]:
        """How scores were come by, for the record."""
        return {**({} if self._task is None else self._task.tags()), **self._batches.tags}

    def of_test_rows(self, model: PackModel) -> list[RowScores] | None:
        """How every member does on each of the test rows; None before the last step, and where there are none."""
        rows = self._batches.data.test
        with self._stopwatch.phase("eval"):
            if model.completed < self._last_step or not len(rows):
                return None
            losses = score_rows_alone(model, self._batches, rows, self._sum_over_workers)
            scores = [RowScores.of(rows, own) for own in losses.cpu()]
        if self._task is not None:
            with self._stopwatch.phase("generate"):
                right = self._task.correct(model, self._batches, "test", self._sum_over_workers).cpu()
                scores = [own.with_correct(mine) for own, mine in zip(scores, right, strict=True)]
        return scores
