"""Scores a pack's members besides their evaluation loss: task, held-out text, test rows, sample answers."""

from collections.abc import Callable, Mapping

from loragrid.evaluation.kept_answers import KeptAnswers
from loragrid.evaluation.observers import HeldOutTextLoss, TaskFigures
from loragrid.evaluation.row_scores import RowScores
from loragrid.evaluation.sample_answers import MemberAnswers, SampleAnswers
from loragrid.evaluation.task_scorer import TaskScorer
from loragrid.training.batches import PackBatches
from loragrid.training.evaluate import score_row_by_row
from loragrid.training.loop import Observation
from loragrid.training.meters import Stopwatch
from loragrid.training.step import PackModel, SumOverWorkers


class PackScoring:
    """Scores a pack whose training ends at `last_step` on its `batches`.

    task: the scorer of its task, if any. samples: asks for sample answers, if the experiment wants any. `stopwatch`
    counts the scoring of the test rows as `eval`, that of the task and the sample answers as `generate`.
    """

    def __init__(
        self,
        batches: PackBatches,
        task: TaskScorer | None,
        *,
        last_step: int,
        sum_over_workers: SumOverWorkers,
        stopwatch: Stopwatch,
        samples: SampleAnswers | None = None,
    ) -> None:
        self._batches, self._task, self._last_step = batches, task, last_step
        self._sum_over_workers, self._stopwatch = sum_over_workers, stopwatch
        self._samples, self._kept = samples, None
        if samples is not None and samples.prompts.is_kept:
            self._kept = KeptAnswers(keys=tuple(question.key for question in samples.prompts.questions))

    def observations(
        self, evaluation_is_due: Callable[[int], bool], forgetting_every: int | None = None
    ) -> list[Observation]:
        """The measurements that the training loop makes besides training and evaluation; see `HeldOutTextLoss`."""
        found: list[Observation] = []
        if self._task is not None:
            keep = self._kept_of("eval")
            found.append(TaskFigures(scorer=self._task, batches=self._batches, last_step=self._last_step, keep=keep))
        if self._batches.data.held_out_text is not None:
            found.append(
                HeldOutTextLoss(
                    batches=self._batches,
                    last_step=self._last_step,
                    every=forgetting_every,
                    evaluation_is_due=evaluation_is_due,
                )
            )
        return found

    def tags(self) -> Mapping[str, str]:
        """How the scores were computed, as MLflow tags."""
        of_samples = {} if self._samples is None else self._samples.tags()
        return {**({} if self._task is None else self._task.tags()), **self._batches.tags, **of_samples}

    def of_test_rows(self, model: PackModel) -> list[RowScores] | None:
        """Every member's scores on the test rows; None before the last step, and without test rows."""
        rows = self._batches.data.test
        with self._stopwatch.phase("eval"):
            if model.completed < self._last_step or not len(rows):
                return None
            losses = score_row_by_row(model, self._batches, rows, self._sum_over_workers)
            scores = [RowScores.of(rows, own) for own in losses.cpu()]
        if self._task is not None:
            with self._stopwatch.phase("generate"):
                keep = self._kept_of("test")
                columns = self._task.score(model, self._batches, "test", self._sum_over_workers, keep=keep)
            figures = self._task.figures_of(columns)
            for member, own in enumerate(figures):
                of_member = {name: values[member].tolist() for name, values in columns.items()}
                scores[member] = scores[member].with_task(of_member, own)
        return scores

    def sample_answers(self, model: PackModel) -> list[MemberAnswers] | None:
        """Every member's sample answers after the last step, when the task has scored its rows; None without any."""
        if self._samples is None or model.completed < self._last_step:
            return None
        kept = None if self._kept is None else self._kept.answers()
        with self._stopwatch.phase("generate"):
            return self._samples.ask(model, self._batches, self._sum_over_workers, kept)

    def _kept_of(self, split: str) -> KeptAnswers | None:
        """Where the task's answers to rows of this split are kept; None if no sample prompt is among them."""
        return self._kept if self._samples is not None and self._samples.prompts.split == split else None
