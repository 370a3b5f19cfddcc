"""Writes one trial into its MLflow run."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loragrid.comparison.fingerprint import changes_on_the_way
from loragrid.planning.adapted_layers import AdaptedLayers
from loragrid.planning.plan import count_parameters
from loragrid.tracking.convergence import Convergence
from loragrid.tracking.previous_run import PreviousTrial
from loragrid.tracking.recorder import Recorder
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.tags import ADAPTED_LAYERS_TAG
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import OUTPUTS, TrialStore


class TrialWriter:
    """The MLflow run of one trial: `open` or `resume` it, add to it, `end` it.

    Workers that replace others may report the same steps and figures again; each is recorded once.
    """

    def __init__(self, trial: Trial, recorder: Recorder) -> None:
        self.trial = trial
        self._recorder = recorder
        self._convergence = Convergence(threshold=trial.training.loss_threshold)
        self._last_step = -1
        self._figures: set[str] = set()
        self._worker_tags: dict[str, str] = {}  # compared with those of later workers, whose hardware may differ

    def open(self, tags: Mapping[str, str]) -> None:
        """Start the run with the trial's parameters, its exact parameter counts and the layers it adapts."""
        trial_id = self.trial.trial_id
        layers = AdaptedLayers.of(self.trial)
        adapted = {ADAPTED_LAYERS_TAG: layers.sentence()} if layers.names else {}
        self._recorder.start_trial(trial_id, self.trial.parameters(), {**tags, **adapted}, name=self.trial.run_name)
        counts = count_parameters(self.trial)
        self._recorder.log_summary(
            trial_id,
            {
                "parameters/trainable": counts.trainable,
                "parameters/stored": counts.stored,
                "parameters/shared": counts.shared,
            }
            | ({"parameters/adapted_layers": len(layers.names)} if layers.names else {}),
        )

    def resume(self, tags: Mapping[str, str], previous: PreviousTrial) -> None:
        """Continue the run of a trial that did not finish. `previous`: what MLflow holds of it."""
        self._recorder.resume_trial(self.trial.trial_id, tags)
        self._convergence.add(previous.evaluations)
        self._last_step = previous.last_step
        self._figures |= previous.figures
        self._worker_tags |= previous.tags

    def add_records(self, records: Sequence[dict[str, float]]) -> None:
        """Add the steps that are not recorded yet to the trial's curves."""
        new = [record for record in records if record["step"] > self._last_step]
        if new:
            self._recorder.log_records(self.trial.trial_id, new)
            self._convergence.add(new)
            self._last_step = int(new[-1]["step"])

    def add_figures(self, figures: Mapping[str, float]) -> None:
        """Record the figures that are not recorded yet."""
        new = {key: value for key, value in figures.items() if key not in self._figures}
        self._recorder.log_summary(self.trial.trial_id, new)
        self._figures |= figures.keys()
        if "time/step_seconds" in figures:
            self._convergence.step_seconds = figures["time/step_seconds"]

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags from the trial's workers; if one that affects results changes, keep its earlier values too."""
        tags = {**tags, **changes_on_the_way(self._worker_tags, tags)}
        self._worker_tags |= tags
        self._recorder.tag_trial(self.trial.trial_id, tags)

    def end(self, end: TrialEnd, store: TrialStore) -> TrialEnd:
        """Close the run, with the outputs in `store` if the trial finished; return the end as it was recorded.

        A finished trial whose outputs cannot be recorded counts as FAILED.
        """
        trial_id = self.trial.trial_id
        if end.status == "FINISHED":
            end = self._record_outputs(end, store)
        if end.traceback:
            with tempfile.TemporaryDirectory() as name:
                (Path(name) / "traceback.txt").write_text(end.traceback, encoding="utf-8")
                self._recorder.log_artifacts(trial_id, Path(name), "failure")
        seconds = {f"time/{phase}_seconds": value for phase, value in end.seconds.items()}
        self._recorder.log_summary(trial_id, self._convergence.summary() | seconds)
        self._recorder.end_trial(trial_id, end.status, end.reason)
        return end

    def _record_outputs(self, end: TrialEnd, store: TrialStore) -> TrialEnd:
        for output in OUTPUTS:
            try:
                with tempfile.TemporaryDirectory() as name:
                    if store.fetch_output(self.trial.trial_id, output, Path(name)):
                        self._recorder.log_artifacts(self.trial.trial_id, Path(name), output)
            except OSError as error:
                return replace(end, status="FAILED", reason=f"the {output} could not be recorded: {error}")
        return end
