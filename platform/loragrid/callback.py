"""Carries what lanes report into MLflow and onto the screen: the Tune callback of a sweep's driver process."""

import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.train import Checkpoint
from ray.tune import Callback
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from loragrid.convergence import Convergence
from loragrid.glossary import STOPPED_EARLY
from loragrid.grid import Trial
from loragrid.messages import ADAPTERS, PackUpdate, TrialEnd
from loragrid.planning import Lane, Pack, count_parameters
from loragrid.progress import SweepProgress
from loragrid.tracking import Recorder, card_tags


@dataclass(kw_only=True)
class SweepOutcome:
    """How every trial ended: trial id -> MLflow status, and for those that failed the reason."""

    statuses: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def is_as_planned(self, trial_id: str) -> bool:
        """Whether the trial finished, or was stopped early as the experiment asks."""
        return self.statuses.get(trial_id) == "FINISHED" or self.reasons.get(trial_id, "").startswith(STOPPED_EARLY)


class RecordingCallback(Callback):
    """Opens a run for every trial whose pack starts, writes what arrives, and ends the runs with the right status.

    `lane_of` turns a Tune trial's config and id into the lane it trains. `several_rounds`: the sweep closes the record
    itself, for Tune runs more than once.
    """

    def __init__(
        self,
        recorder: Recorder,
        lane_of: Callable[[Mapping[str, Any], str], Lane],
        environment: Mapping[str, str],
        progress: SweepProgress | None = None,
        *,
        several_rounds: bool = False,
    ) -> None:
        self.recorder, self.lane_of, self.environment = recorder, lane_of, environment
        self.progress, self.several_rounds = progress, several_rounds
        self.outcome = SweepOutcome()
        self._lanes: dict[str, Lane] = {}
        self._failed: list[Lane] = []
        self._trials: dict[str, Trial] = {}  # those whose runs were opened
        self._convergence: dict[str, Convergence] = {}
        self._checkpoints: dict[str, str] = {}
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks into its own experiment state, which LoraGrid never reads: MLflow is the record.
        return {}

    def close(self) -> None:
        """End the sweep's run, and what is still open in it; more than one call does nothing."""
        if self._closed:
            return
        self._closed = True
        open_trials = [trial for trial in self._trials.values() if trial.trial_id not in self.outcome.statuses]
        for trial in open_trials:
            self._end(trial, TrialEnd(status="KILLED", reason="interrupted"))
        failed = "FAILED" in self.outcome.statuses.values()
        self.recorder.end_sweep("KILLED" if open_trials else "FAILED" if failed else "FINISHED")

    def left_by_failed_lanes(self) -> list[Pack]:
        """The packs that lanes had not begun when they failed, since the last call; none of interrupted lanes."""
        packs = [pack for lane in self._failed for pack in lane.packs]
        self._failed.clear()
        return [pack for pack in packs if not any(trial.trial_id in self._trials for trial in pack.trials)]

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Tune is done."""
        if not self.several_rounds:
            self.close()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A lane starts."""
        if trial.trial_id in self._lanes:
            return
        try:
            lane = self.lane_of(trial.config, trial.trial_id)
        except ValueError:
            return  # not a trial of the experiment: the Tune trial raises the same, and fails alone
        self._lanes[trial.trial_id] = lane
        self._start(lane.packs[0].trials, lane.packs[0].pack_id)
        if self.progress:
            self.progress.starting(lane)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An update of a pack: records, figures, ends, adapters."""
        update = result.get("update")
        if not isinstance(update, PackUpdate):
            return
        lane = self._lanes[trial.trial_id]
        mentioned = set(update.trial_ids)
        self._start([member for member in lane.trials if member.trial_id in mentioned], update.pack_id)
        for trial_id, records in update.records.items():
            self.recorder.log_records(trial_id, records)
            self._convergence[trial_id].add(records)
        for trial_id, figures in update.figures.items():
            self.recorder.log_summary(trial_id, figures)
            if "time/step_seconds" in figures:
                self._convergence[trial_id].step_seconds = figures["time/step_seconds"]
        for trial_id, tags in update.tags.items():
            self.recorder.tag_trial(trial_id, tags)
        self._record_adapters(trial.trial_id, update, result.get(CHECKPOINT_PATH_KEY))
        for trial_id, end in update.ended.items():
            self._end(self._trials[trial_id], end)
        if self.progress:
            self.progress.updated(update)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A lane ended; what it did not end itself was stopped early by the sweep's scheduler."""
        lane = self._lanes.get(trial.trial_id)
        if lane is None:
            return
        for member in self._open(lane):
            self._end(member, TrialEnd(status="KILLED", reason=f"{STOPPED_EARLY} by the sweep's scheduler"))
        if self.progress:
            self.progress.ended(lane)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A lane failed: every trial of it that was begun and had not ended is FAILED with the reason."""
        lane = self._lanes.get(trial.trial_id)
        if lane is None:
            return
        self._failed.append(lane)
        error = _error_of(trial)
        reason = failure_reason(error)
        text = "" if error is None else "".join(traceback.format_exception(error))
        for member in self._open(lane):
            self._end(member, TrialEnd(status="FAILED", reason=reason, traceback=text))
        if self.progress:
            self.progress.failed(lane, reason)

    def _open(self, lane: Lane) -> list[Trial]:
        started = [trial for trial in lane.trials if trial.trial_id in self._trials]
        return [trial for trial in started if trial.trial_id not in self.outcome.statuses]

    def _start(self, trials: Sequence[Trial], pack_id: str) -> None:
        """Open the runs of trials that have none: parameters, counts and the method's card."""
        for trial in trials:
            if trial.trial_id in self._trials:
                continue
            self._trials[trial.trial_id] = trial
            tags = {"loragrid.pack": pack_id, **self.environment, **card_tags(trial.method.card)}
            self.recorder.start_trial(trial.trial_id, trial.parameters(), tags)
            counts = count_parameters(trial)
            self.recorder.log_summary(
                trial.trial_id,
                {
                    "parameters/trainable": counts.trainable,
                    "parameters/stored": counts.stored,
                    "parameters/shared": counts.shared,
                },
            )
            self._convergence[trial.trial_id] = Convergence(threshold=trial.training.loss_threshold)

    def _record_adapters(self, tune_trial_id: str, update: PackUpdate, path: str | None) -> None:
        """Record the adapters that came with an update, and delete the lane's checkpoint before this one."""
        if path is None or path == self._checkpoints.get(tune_trial_id):
            return
        with Checkpoint(path).as_directory() as folder:
            for trial_id in update.ended:
                adapter = Path(folder) / ADAPTERS / trial_id
                if adapter.is_dir():
                    self.recorder.log_artifacts(trial_id, adapter, "adapter")
        before = self._checkpoints.get(tune_trial_id)
        if before is not None:
            old = Checkpoint(before)
            assert old.filesystem is not None
            old.filesystem.delete_dir(old.path)
        self._checkpoints[tune_trial_id] = path

    def _end(self, trial: Trial, end: TrialEnd) -> None:
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


def _error_of(trial: Any) -> BaseException | None:
    """What a Tune trial raised. Tune's own accessor looks where the file is copied to later."""
    if trial.pickled_error_file is None:
        return None
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    return error if isinstance(error, BaseException) else None


def failure_reason(error: BaseException | None) -> str:
    """What went wrong in a worker, in one line: the innermost cause, without Ray's wrapping."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        failures = getattr(error, "worker_failures", None)
        nested = next(iter(failures.values()), None) if failures else None
        error = nested or getattr(error, "cause", None) or error.__cause__
    for cause in reversed(causes):
        text = str(cause).strip()
        if text:
            # Ray's own wrappers carry the remote traceback as text, whose last line is the exception itself.
            return text.splitlines()[-1]
    return "unknown"
