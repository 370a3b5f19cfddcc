"""Carries what packs report into MLflow and onto the screen: the Tune callback of a sweep's driver process."""

import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.train import Checkpoint
from ray.tune import Callback
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

from loragrid.convergence import Convergence
from loragrid.grid import Trial
from loragrid.messages import ADAPTERS, PackUpdate
from loragrid.planning import Pack, count_parameters
from loragrid.progress import SweepProgress
from loragrid.tracking import Recorder, card_tags


@dataclass(kw_only=True)
class SweepOutcome:
    """How every trial ended: trial id -> MLflow status, and for those that failed the reason."""

    statuses: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class RecordingCallback(Callback):
    """Opens a run for every trial of a pack that starts, writes what arrives, and ends the runs with the right status.

    `pack_of` turns a Tune trial's config and id into the pack it trains.
    """

    def __init__(
        self,
        recorder: Recorder,
        pack_of: Callable[[Mapping[str, Any], str], Pack],
        environment: Mapping[str, str],
        progress: SweepProgress | None = None,
    ) -> None:
        self.recorder, self.pack_of, self.environment = recorder, pack_of, environment
        self.progress = progress
        self.outcome = SweepOutcome()
        self._packs: dict[str, Pack] = {}
        self._convergence: dict[str, Convergence] = {}
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks into its own experiment state, which LoraGrid never reads: MLflow is the record.
        return {}

    def close(self) -> None:
        """End the sweep's run, and what is still open in it; more than one call does nothing."""
        if self._closed:
            return
        self._closed = True
        interrupted = False
        for pack in self._packs.values():
            for member in pack.trials:
                if member.trial_id not in self.outcome.statuses:
                    interrupted = True
                    self._end(member, "KILLED", "interrupted")
        failed = "FAILED" in self.outcome.statuses.values()
        self.recorder.end_sweep("KILLED" if interrupted else "FAILED" if failed else "FINISHED")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Tune is done."""
        self.close()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A pack starts: its trials' runs open, with parameters, counts and the method's card."""
        if trial.trial_id in self._packs:
            return
        try:
            pack = self.pack_of(trial.config, trial.trial_id)
        except ValueError:
            return  # not a trial of the experiment: the Tune trial raises the same, and fails alone
        self._packs[trial.trial_id] = pack
        for member in pack.trials:
            self._start(member, pack)
        if self.progress:
            self.progress.started(pack)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An update of a pack: records, figures, adapters."""
        update = result.get("update")
        if not isinstance(update, PackUpdate):
            return
        pack = self._packs[trial.trial_id]
        for trial_id, records in update.records.items():
            self.recorder.log_records(trial_id, records)
            self._convergence[trial_id].add(records)
        for trial_id, figures in update.figures.items():
            self.recorder.log_summary(trial_id, figures)
            self._convergence[trial_id].step_seconds = figures.get("time/step_seconds")
        if update.tags:
            for member in pack.trials:
                self.recorder.tag_trial(member.trial_id, update.tags)
        if update.finished:
            self._finish(pack, update, result.get(CHECKPOINT_PATH_KEY))
        if self.progress:
            self.progress.updated(pack, update)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A pack ended; what it did not finish was stopped early by the sweep's scheduler."""
        pack = self._packs.get(trial.trial_id)
        if pack is None:
            return
        for member in pack.trials:
            if member.trial_id not in self.outcome.statuses:
                self._summarise(member)
                self._end(member, "KILLED", "stopped early by the sweep's scheduler")
        if self.progress:
            self.progress.ended(pack)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A pack failed: every trial of it that had not ended is FAILED with the reason."""
        pack = self._packs.get(trial.trial_id)
        if pack is None:
            return
        error = _error_of(trial)
        reason = failure_reason(error)
        for member in pack.trials:
            if member.trial_id not in self.outcome.statuses:
                if error is not None:
                    self._log_traceback(member, error)
                self._end(member, "FAILED", reason)
        if self.progress:
            self.progress.failed(pack, reason)

    def _start(self, trial: Trial, pack: Pack) -> None:
        tags = {"loragrid.pack": pack.pack_id, **self.environment, **card_tags(trial.method.card)}
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

    def _finish(self, pack: Pack, update: PackUpdate, checkpoint_path: str | None) -> None:
        for member in pack.trials:
            trial_id = member.trial_id
            self._summarise(member)
            self.recorder.log_summary(
                trial_id, {f"time/{phase}_seconds": seconds for phase, seconds in update.seconds.items()}
            )
            if trial_id in update.diverged_at:
                self._end(
                    member, "FAILED", f"diverged: loss or gradient not finite at step {update.diverged_at[trial_id]}"
                )
        if checkpoint_path is not None:
            with Checkpoint(checkpoint_path).as_directory() as folder:
                for member in pack.trials:
                    adapter = Path(folder) / ADAPTERS / member.trial_id
                    if adapter.is_dir():
                        self.recorder.log_artifacts(member.trial_id, adapter, "adapter")
        for member in pack.trials:
            if member.trial_id not in self.outcome.statuses:
                self._end(member, "FINISHED")

    def _log_traceback(self, trial: Trial, error: BaseException) -> None:
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "traceback.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            self.recorder.log_artifacts(trial.trial_id, Path(name), "failure")

    def _summarise(self, trial: Trial) -> None:
        self.recorder.log_summary(trial.trial_id, self._convergence[trial.trial_id].summary())

    def _end(self, trial: Trial, status: Any, reason: str = "") -> None:
        self.recorder.end_trial(trial.trial_id, status, reason)
        self.outcome.statuses[trial.trial_id] = status
        if reason:
            self.outcome.reasons[trial.trial_id] = reason


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
