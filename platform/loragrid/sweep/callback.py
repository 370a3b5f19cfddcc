"""Translates Tune's hooks: writes the reports of queues into MLflow and onto the screen."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
from ray.tune import Callback

from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.queue_failure import describe_failure
from loragrid.sweep.queue_tracker import QueueTracker
from loragrid.sweep.ray_internals import error_of
from loragrid.sweep.summary import SweepCost
from loragrid.sweep.sweep_writer import SweepWriter
from loragrid.tracking.previous_run import PreviousSweep
from loragrid.tracking.recorder import Recorder
from loragrid.trials.outcome import STOPPED_EARLY, SweepOutcome, TrialEnd
from loragrid.trials.packing import Pack, PackQueue
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate, QueueFailure


class RecordingCallback(Callback):
    """Passes Tune's events about queues to the record, the queue tracker, the cost and the display.

    queue_of: turns a Tune trial's config and id into the queue it trains. environment: tags of every trial's run.
    several_runs: the sweep runs Tune more than once and closes the record itself. previous: the record of the sweep's
    earlier runs. cost: adds up the sweep's cost; if given, it is recorded with a summary.
    """

    def __init__(
        self,
        recorder: Recorder,
        store: TrialStore,
        queue_of: Callable[[Mapping[str, Any], str], PackQueue],
        environment: Mapping[str, str],
        progress: SweepProgress | None = None,
        *,
        several_runs: bool = False,
        previous: PreviousSweep | None = None,
        cost: SweepCost | None = None,
    ) -> None:
        self.queue_of, self.progress, self.several_runs = queue_of, progress, several_runs
        self._cost = cost
        self._writer = SweepWriter(recorder, store, environment, previous)
        self._queues = QueueTracker(self._writer, retries=several_runs)

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks into its own experiment state, which LoraGrid never reads: MLflow is the record.
        return {}

    @property
    def outcome(self) -> SweepOutcome:
        """How the trials have ended so far."""
        return self._writer.outcome

    @property
    def curves(self) -> pd.DataFrame | None:
        """After `close`: all curves as MLflow holds them, if the summary has read them."""
        return self._writer.curves

    def close(self, planned: Iterable[str] = (), *, is_whole: bool = True) -> None:
        """End the sweep's run and the trials that are still open in it; further calls do nothing.

        planned, is_whole: see `SweepWriter.close`.
        """
        self._writer.close(planned, self._cost, is_whole=is_whole)

    def left_by_failed_queues(self) -> list[Pack]:
        """The packs still to be trained of queues that failed since the last call; interrupted queues leave none."""
        return self._queues.take_left()

    def fail_unbegun(self, packs: Iterable[Pack], failure: QueueFailure) -> None:
        """Record trials that no queue has begun as FAILED; otherwise the sweep would look finished."""
        self._queues.fail_unbegun(list(packs), failure)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Tune has ended."""
        if not self.several_runs:
            self.close()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A queue starts, for the first time or again."""
        if self._queues.find(trial.trial_id) is not None:
            return
        queue = self._find_queue(trial)
        if queue is None:
            return
        if self._cost is not None:
            self._cost.queue_started(trial.trial_id)
        self._queues.begin(trial.trial_id, queue)
        if self.progress:
            self.progress.starting(queue)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A queue reports an update of a pack (records, figures, ends), or its own failure."""
        queue = self._queues.find(trial.trial_id)
        failure, update = result.get("failure"), result.get("update")
        if queue is None:
            return
        if isinstance(failure, QueueFailure):
            self._show_failure(queue, failure, self._queues.give_up(trial.trial_id, failure))
        if not isinstance(update, PackUpdate):
            return
        if self._cost is not None:
            self._cost.queue_reported(trial.trial_id)
        self._queues.update(trial.trial_id, update)
        if self.progress:
            self.progress.updated(update)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A queue ended; trials that it did not end itself were stopped early by the sweep's scheduler.

        Tune also calls this for a queue that has reported its own failure; other queues train its open trials.
        """
        queue = self._queues.find(trial.trial_id)
        if queue is None:
            return
        if self._cost is not None:
            self._cost.queue_ended(trial.trial_id)
        if self._queues.has_given_up(trial.trial_id):
            return
        for member in self._writer.open_trials(queue.trials):
            self._writer.end(member, TrialEnd(status="KILLED", reason=f"{STOPPED_EARLY} by the sweep's scheduler"))
        if self.progress:
            self.progress.ended(queue)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A queue's Tune trial failed, and Tune does not retry it."""
        queue = self._queues.find(trial.trial_id) or self._find_queue(trial)
        if queue is None:
            return
        if self._cost is not None:
            self._cost.queue_ended(trial.trial_id)
        failure = describe_failure(error_of(trial))
        self._show_failure(queue, failure, self._queues.lose(trial.trial_id, queue, failure))

    def _find_queue(self, trial: Any) -> PackQueue | None:
        """The queue of a Tune trial; None if its config is no trial of the experiment.

        The Tune trial itself raises the same ValueError and fails.
        """
        try:
            return self.queue_of(trial.config, trial.trial_id)
        except ValueError:
            return None

    def _show_failure(self, queue: PackQueue, failure: QueueFailure, halved: Iterable[Pack]) -> None:
        if not self.progress:
            return
        ended = [trial.trial_id for trial in queue.trials if self._writer.has_ended(trial)]
        self.progress.failed(queue, failure.reason, ended)
        for pack in halved:
            self.progress.halved(pack)
