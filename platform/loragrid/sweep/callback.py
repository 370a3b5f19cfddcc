"""Carries what queues report into MLflow and onto the screen: the Tune callback of a sweep's driver process."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from ray import cloudpickle
from ray.tune import Callback

from loragrid.comparison.fingerprint import changes_on_the_way
from loragrid.planning.plan import count_parameters
from loragrid.sweep.open_packs import OpenPacks, sort_open_packs
from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.queue_failure import describe_failure
from loragrid.sweep.summary import SweepCost, record_summary
from loragrid.tracking.convergence import Convergence
from loragrid.tracking.previous_run import PreviousSweep
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import card_tags
from loragrid.trials.outcome import INVARIANT_VIOLATED, STOPPED_EARLY, SweepOutcome, TrialEnd
from loragrid.trials.packing import Pack, PackQueue
from loragrid.trials.tags import LABEL_TAG, OUT_OF_MEMORY_TAG
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import OUTPUTS, TrialStore
from loragrid.worker.messages import PackUpdate, QueueFailure, split_tags


class RecordingCallback(Callback):
    """Opens a run for every trial whose pack starts, writes what arrives, and ends the runs with the right status.

    `queue_of` turns a Tune trial's config and id into the queue it trains. `several_runs`: the sweep closes the record
    itself, for Tune runs more than once. `previous`: what was recorded when the sweep was run before. `cost`: counts
    what the sweep takes, which is then recorded with a summary.
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
        self.recorder, self.store = recorder, store
        self.queue_of, self.environment = queue_of, environment
        self.progress, self.several_runs = progress, several_runs
        self._cost = cost
        self.outcome = SweepOutcome()
        self.curves: pd.DataFrame | None = None
        """After `close`: all curves, as MLflow holds them, where the summary has read them."""
        if previous is not None:
            self.outcome.statuses.update(previous.outcome.statuses)
            self.outcome.reasons.update(previous.outcome.reasons)
        self._previous = dict(previous.begun) if previous is not None else {}
        self._queues: dict[str, PackQueue] = {}
        self._failed: list[PackQueue] = []
        self._given_up: set[str] = set()  # Tune's ids of queues that said so themselves
        self._left: list[Pack] = []  # of packs that queues have begun
        self._at_work: dict[str, frozenset[str]] = {}  # a queue, by Tune's id -> the trials that it trains just now
        self._trials: dict[str, Trial] = {}  # those whose runs were opened
        self._convergence: dict[str, Convergence] = {}
        self._last_step: dict[str, int] = {}
        self._figures: dict[str, set[str]] = {}
        # What workers have said of themselves: others may go on with a trial elsewhere.
        self._said = {trial_id: dict(begun.tags) for trial_id, begun in self._previous.items()}
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks into its own experiment state, which LoraGrid never reads: MLflow is the record.
        return {}

    def close(self, planned: Iterable[str] = ()) -> None:
        """End the sweep's run, and what is still open in it; more than one call does nothing.

        `planned`: the trials without whose ends the sweep was interrupted.
        """
        if self._closed:
            return
        self._closed = True
        is_whole = self.outcome.statuses.keys() >= set(planned)
        open_trials = [trial for trial in self._trials.values() if trial.trial_id not in self.outcome.statuses]
        for trial in open_trials:
            self._end(trial, TrialEnd(status="KILLED", reason="interrupted"))
        if self._cost is not None:
            self._summarise(self._cost)
        failed = "FAILED" in self.outcome.statuses.values()
        interrupted = open_trials or not is_whole
        self.recorder.end_sweep("KILLED" if interrupted else "FAILED" if failed else "FINISHED")
        # The rest may go on one day.
        self.store.delete(trial_id for trial_id in self._trials if self.outcome.is_final(trial_id))

    def _summarise(self, cost: SweepCost) -> None:
        """Record what the sweep came to; whatever is wrong with that, the sweep itself ends as it would."""
        try:
            self.curves = record_summary(self.recorder, self.recorder.sweep_name, cost)
        except Exception as error:  # MLflow's, the database driver's, matplotlib's: the trials are recorded
            self.recorder.log_sweep_summary({}, {"loragrid.summary.problem": f"{type(error).__name__}: {error}"})

    def left_by_failed_queues(self) -> list[Pack]:
        """What is to be trained of queues that failed, since the last call; nothing of interrupted queues.

        Where memory ran out, packs that were begun, in halves or as they were; then what was not begun.
        """
        packs = [pack for queue in self._failed for pack in queue.packs]
        unbegun = [
            replace(pack, trials=tuple(trial for trial in pack.trials if trial.trial_id not in self._trials))
            for pack in packs
        ]
        left = [*self._left, *(pack for pack in unbegun if pack.trials)]
        self._failed.clear()
        self._left.clear()
        return left

    def fail_unbegun(self, packs: Iterable[Pack], failure: QueueFailure) -> None:
        """Record trials that no queue has begun: a sweep without them would pass for a finished one."""
        for pack in packs:
            unbegun = [
                trial
                for trial in pack.trials
                if trial.trial_id not in self._trials and trial.trial_id not in self.outcome.statuses
            ]
            self._start(unbegun, pack.pack_id)
            for trial in unbegun:
                self._end(trial, TrialEnd(status="FAILED", reason=failure.reason, traceback=failure.traceback))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Tune is done."""
        if not self.several_runs:
            self.close()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A queue starts."""
        if trial.trial_id in self._queues:
            return
        queue = self._find_queue(trial)
        if queue is None:
            return
        self._queues[trial.trial_id] = queue
        if self._cost is not None:
            self._cost.queue_started(trial.trial_id)
        self._at_work[trial.trial_id] = frozenset(member.trial_id for member in queue.packs[0].trials)
        self._start(queue.packs[0].trials, queue.packs[0].pack_id)
        if self.progress:
            self.progress.starting(queue)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An update of a pack (records, figures, ends), or the failure of the whole queue.

        Workers that took over from others say again what those may have said: every step and every end counts once.
        """
        queue = self._queues.get(trial.trial_id)
        failure, update = result.get("failure"), result.get("update")
        if queue is not None and isinstance(failure, QueueFailure):
            self._given_up.add(trial.trial_id)
            self._fail(queue, failure, self._at_work[trial.trial_id])
        if queue is None or not isinstance(update, PackUpdate):
            return
        if self._cost is not None:
            self._cost.queue_spoke(trial.trial_id)
        mentioned = frozenset(update.trial_ids)
        self._at_work[trial.trial_id] = frozenset() if update.done else mentioned
        self._start([member for member in queue.trials if member.trial_id in mentioned], update.pack_id)
        for trial_id, records in update.records.items():
            new = [record for record in records if record["step"] > self._last_step.get(trial_id, -1)]
            if new and trial_id not in self.outcome.statuses:
                self.recorder.log_records(trial_id, new)
                self._convergence[trial_id].add(new)
                self._last_step[trial_id] = int(new[-1]["step"])
        for trial_id, figures in update.figures.items():
            known = self._figures.setdefault(
                trial_id, set(self._previous[trial_id].figures if trial_id in self._previous else ())
            )
            self.recorder.log_summary(trial_id, {key: value for key, value in figures.items() if key not in known})
            known |= figures.keys()
            if "time/step_seconds" in figures:
                self._convergence[trial_id].step_seconds = figures["time/step_seconds"]
        for trial_id, tags in update.tags.items():
            said = self._said.setdefault(trial_id, {})
            kept = changes_on_the_way(said, tags)
            said |= {**tags, **kept}
            self.recorder.tag_trial(trial_id, {**tags, **kept})
        for trial_id, end in update.ended.items():
            if trial_id not in self.outcome.statuses:
                self._end(self._trials[trial_id], end)
        if self.progress:
            self.progress.updated(update)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A queue ended; what it did not end itself was stopped early by the sweep's scheduler.

        To Tune a queue has ended, too, that said that it failed: what that left open is trained by another.
        """
        queue = self._queues.get(trial.trial_id)
        if queue is None:
            return
        if self._cost is not None:
            self._cost.queue_ended(trial.trial_id)
        if trial.trial_id in self._given_up:
            return
        for member in self._open(queue.trials):
            self._end(member, TrialEnd(status="KILLED", reason=f"{STOPPED_EARLY} by the sweep's scheduler"))
        if self.progress:
            self.progress.ended(queue)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A queue's Tune trial failed, and was not tried again.

        One whose process could not be started, as often as it was tried, has never been announced. That is no pack's
        doing, and the next queue would fare no better: all its packs fail.
        """
        queue, failure = self._queues.get(trial.trial_id), describe_failure(_error_of(trial))
        if queue is None:
            queue = self._find_queue(trial)
            if queue is None:
                return
            self.fail_unbegun(queue.packs, failure)
        if self._cost is not None:
            self._cost.queue_ended(trial.trial_id)
        self._fail(queue, failure, self._at_work.get(trial.trial_id, frozenset()))

    def _find_queue(self, trial: Any) -> PackQueue | None:
        """None for what is no trial of the experiment: the Tune trial raises the same, and fails alone."""
        try:
            return self.queue_of(trial.config, trial.trial_id)
        except ValueError:
            return None

    def _fail(self, queue: PackQueue, failure: QueueFailure, at_work: frozenset[str]) -> None:
        """Every trial of the queue that was begun and had not ended is FAILED with the reason.

        Where memory ran out, that is one that was trained alone: a pack of several is left in halves, which may fit,
        and those that wait at a rung are left as they are.
        """
        self._failed.append(queue)
        begun = [pack for pack in queue.packs if any(trial.trial_id in self._trials for trial in pack.trials)]
        may_fit = failure.out_of_memory and self.several_runs
        if may_fit:  # also what of a pack had not been begun: it goes with the rest
            for pack in begun:
                self._start(pack.trials, pack.pack_id)
        packs = [replace(pack, trials=tuple(self._open(pack.trials))) for pack in begun]
        found = sort_open_packs(packs, at_work) if may_fit else OpenPacks.lost(packs)
        for member in [trial for pack in packs for trial in pack.trials if trial.trial_id in found.alone]:
            self._end(member, TrialEnd(status="FAILED", reason=failure.reason, traceback=failure.traceback))
            if failure.out_of_memory:
                self.recorder.tag_trial(member.trial_id, {OUT_OF_MEMORY_TAG: "true"})
        if self.progress:
            ended = [trial.trial_id for trial in queue.trials if trial.trial_id in self.outcome.statuses]
            self.progress.failed(queue, failure.reason, ended)
        for pack in found.too_large:
            self._halve(pack, failure.reason)
        self._left += found.waiting

    def _halve(self, pack: Pack, reason: str) -> None:
        for half in pack.halves():
            for member in half.trials:
                self.recorder.tag_trial(member.trial_id, split_tags(half, pack, reason))
            self._left.append(half)
        if self.progress:
            self.progress.halved(pack)

    def _open(self, trials: Iterable[Trial]) -> list[Trial]:
        started = [trial for trial in trials if trial.trial_id in self._trials]
        return [trial for trial in started if trial.trial_id not in self.outcome.statuses]

    def _start(self, trials: Sequence[Trial], pack_id: str) -> None:
        """Open the runs of trials that have none: parameters, counts and the method's card."""
        for trial in trials:
            if trial.trial_id in self._trials:
                continue
            self._trials[trial.trial_id] = trial
            label = {LABEL_TAG: trial.label or trial.method.name}
            tags = {"loragrid.pack": pack_id, **label, **self.environment, **card_tags(trial.method.card)}
            self._convergence[trial.trial_id] = Convergence(threshold=trial.training.loss_threshold)
            if trial.trial_id in self._previous:
                before = self._previous[trial.trial_id]
                self.recorder.resume_trial(trial.trial_id, tags)
                self._convergence[trial.trial_id].add(before.eval_losses)
                self._last_step[trial.trial_id] = before.last_step
                continue
            self.recorder.start_trial(trial.trial_id, trial.parameters(), tags, name=trial.run_name)
            counts = count_parameters(trial)
            self.recorder.log_summary(
                trial.trial_id,
                {
                    "parameters/trainable": counts.trainable,
                    "parameters/stored": counts.stored,
                    "parameters/shared": counts.shared,
                },
            )

    def _record_outputs(self, trial: Trial, end: TrialEnd) -> TrialEnd:
        """Keep what a finished trial leaves; without it, the trial has failed."""
        for output in OUTPUTS:
            try:
                with tempfile.TemporaryDirectory() as name:
                    if self.store.fetch_output(trial.trial_id, output, Path(name)):
                        self.recorder.log_artifacts(trial.trial_id, Path(name), output)
            except OSError as error:
                return replace(end, status="FAILED", reason=f"the {output} could not be recorded: {error}")
        return end

    def _end(self, trial: Trial, end: TrialEnd) -> None:
        if end.status == "FINISHED":
            end = self._record_outputs(trial, end)
        if end.traceback:
            with tempfile.TemporaryDirectory() as name:
                (Path(name) / "traceback.txt").write_text(end.traceback, encoding="utf-8")
                self.recorder.log_artifacts(trial.trial_id, Path(name), "failure")
        self.recorder.log_summary(
            trial.trial_id,
            self._convergence[trial.trial_id].summary()
            | {f"time/{phase}_seconds": seconds for phase, seconds in end.seconds.items()},
        )
        self.recorder.end_trial(trial.trial_id, end.status, end.reason)
        self.outcome.statuses[trial.trial_id] = end.status
        if end.reason:
            self.outcome.reasons[trial.trial_id] = end.reason
        if not self._closed:  # what was interrupted is to go on one day
            self.store.mark_ended(trial.trial_id)
        if self.outcome.is_final(trial.trial_id) or end.reason.startswith(INVARIANT_VIOLATED):
            # What was spoiled is not gone on with: where the trial is run again, it begins anew.
            self.store.delete_states(trial.trial_id)


def _error_of(trial: Any) -> BaseException | None:
    """What a Tune trial raised. Tune's own accessor looks where the file is copied to later."""
    if trial.pickled_error_file is None:
        return None
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    return error if isinstance(error, BaseException) else None
