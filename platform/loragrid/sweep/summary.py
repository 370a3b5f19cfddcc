"""Summarises a sweep in its own MLflow run: counts, the best trial, the cost, sample answers, the picture of curves."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from loragrid.comparison.ranking import best_trial, ranking_metric
from loragrid.comparison.sample_answers import SAMPLES_TABLE, as_mlflow_table, load_samples
from loragrid.comparison.settings import tasks_of
from loragrid.comparison.table import PHASE_COLUMN, Comparison, is_stopped_early, load_comparison
from loragrid.comparison.verdict import Verdict, load_verdict, trial_to_keep
from loragrid.formatting import is_missing
from loragrid.report.loss_curves import has_losses, plot_loss_curves
from loragrid.sweep.noise_history import noise_metrics
from loragrid.tracking.recorder import Recorder
from loragrid.trials.metrics import best_figure_keys

BEST_TRIAL_TAG = "loragrid.best_trial"
BEST_METRIC_TAG = "loragrid.best_trial.metric"
FIGURES = "figures"
# Short, because `end_sweep` itself waits long for a failing store, and the summary can be computed later.
SUMMARY_PATIENCE_SECONDS = 2.0
START_METRIC = "sweep/start_seconds"


class SweepCost:
    """Adds up the cost of a sweep: wall-clock seconds, and GPU-seconds for which its queues hold GPUs."""

    def __init__(self, gpus_per_queue: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._gpus_per_queue = clock, gpus_per_queue
        self._start = clock()
        self._queues: dict[str, float] = {}
        self._gpu_seconds = 0.0
        self._first_report: float | None = None

    def queue_started(self, queue: str) -> None:
        """A queue asks for its workers; further calls do nothing."""
        self._queues.setdefault(queue, self._clock())

    def queue_reported(self, queue: str) -> None:
        """A queue's workers have reported; the first report of a sweep sets the time that a start takes."""
        if self._first_report is None and queue in self._queues:
            self._first_report = self._clock() - self._queues[queue]

    def queue_ended(self, queue: str) -> None:
        """A queue has released its workers."""
        if queue in self._queues:
            self._gpu_seconds += self._gpus_per_queue * (self._clock() - self._queues.pop(queue))

    def metrics(self) -> dict[str, float]:
        """Metric key -> seconds; queues that have not ended count up to now."""
        now = self._clock()
        running = self._gpus_per_queue * sum(now - start for start in self._queues.values())
        found = {"sweep/wall_seconds": now - self._start}
        if self._first_report is not None:
            found[START_METRIC] = self._first_report
        return found | ({"sweep/gpu_seconds": self._gpu_seconds + running} if self._gpus_per_queue else {})


def record_summary(recorder: Recorder, sweep: str, cost: SweepCost) -> pd.DataFrame | None:
    """Record the summary of a sweep whose trials have ended; return the curves that MLflow holds.

    Does nothing and returns None if MLflow does not answer. The cost of a resumed sweep is added to its earlier cost.
    """
    if not recorder.deliver(SUMMARY_PATIENCE_SECONDS):
        return None
    comparison = load_comparison(recorder.experiment_name, recorder.tracking_uri, sweep)
    verdicts = {label: load_verdict(part) for label, part in tasks_of(comparison).items()}
    best = trial_to_keep(comparison, next(iter(verdicts.values()))) if len(verdicts) == 1 else best_trial(comparison)
    metrics = summary_metrics(comparison, best)
    results = [verdict.result for verdict in verdicts.values() if verdict.result is not None]
    if len(results) == len(verdicts) == 1:  # several tasks have no common noise
        metrics |= noise_metrics(results[0])
    for key, value in cost.metrics().items():
        metrics[key] = value if key == START_METRIC else value + comparison.sweep_metrics.get(key, 0.0)
    named = {BEST_TRIAL_TAG: best, BEST_METRIC_TAG: ranking_metric(comparison.table)} if best else {}
    recorder.log_sweep_summary(metrics, named)
    recorder.log_answer(sweep, comparison.question, answer_text(verdicts))
    if has_losses(comparison):
        with tempfile.TemporaryDirectory() as folder:
            recorder.log_sweep_artifact(plot_loss_curves(comparison, Path(folder) / "loss_curves.png"), FIGURES)
    _record_samples(recorder, tasks_of(comparison), verdicts)
    return comparison.curves


def _record_samples(recorder: Recorder, tasks: Mapping[str, Comparison], verdicts: Mapping[str, Verdict]) -> None:
    """Keep the sample answers of every method's choice as a table, if its trials have any."""
    loaded = {label: load_samples(part, verdicts[label].choices) for label, part in tasks.items()}
    tables = {label: table for label, table in loaded.items() if table is not None and table.rows}
    if tables:
        recorder.log_sweep_table(SAMPLES_TABLE, *as_mlflow_table(tables))


def answer_text(verdicts: Mapping[str, Verdict]) -> str:
    """The answers of a sweep, each with the label of its task if there are several."""
    answers = {label: verdict.answer.sentence for label, verdict in verdicts.items() if verdict.answer.sentence}
    return "\n".join(f"{label}: {answer}" if label else answer for label, answer in answers.items())


def summary_metrics(comparison: Comparison, best: str) -> dict[str, float]:
    """The number of trials per kind of end, with those that confirm among them, and the figures of the trial `best`."""
    rows = comparison.table.to_dict("records")
    ends = Counter("stopped" if is_stopped_early(row) else str(row["status"]).lower() for row in rows)
    metrics = {f"sweep/trials_{end}": float(ends[end]) for end in ("finished", "failed", "stopped")}
    num_confirming = sum(row.get(PHASE_COLUMN) == "confirm" for row in rows)
    if num_confirming:
        metrics["sweep/trials_confirming"] = float(num_confirming)
    for row in rows:
        if row["trial_id"] == best:
            for key, own in best_figure_keys().items():
                if not is_missing(row.get(key)):
                    metrics[own] = float(row[key])
    return metrics
