"""Writes a sweep into MLflow: a run for every trial that starts, and the end of the sweep's own run."""

import json
from collections.abc import Iterable, Mapping

import pandas as pd

from loragrid.planning.timing import cost_shape
from loragrid.sweep.summary import SweepCost, record_summary
from loragrid.sweep.trial_writer import TrialWriter
from loragrid.tracking.previous_run import PreviousSweep
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import card_tags
from loragrid.trials.outcome import DIVERGED, INVARIANT_VIOLATED, SweepOutcome, TrialEnd
from loragrid.trials.tags import ASKED_TAG, COST_SHAPE_TAG, FOUND_TAG, LABEL_TAG, PHASE_TAG, WRITES_BASE_TAG
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate


class SweepWriter:
    """Records which trials of a sweep have started, and how they ended.

    environment: tags of every trial's run. previous: the record of the sweep's earlier runs.
    """

    def __init__(
        self,
        recorder: Recorder,
        store: TrialStore,
        environment: Mapping[str, str],
        previous: PreviousSweep | None = None,
    ) -> None:
        self.recorder, self.store = recorder, store
        self.outcome = SweepOutcome()
        self.curves: pd.DataFrame | None = None
        """After `close`: all curves as MLflow holds them, if the summary has read them."""
        self._environment = environment
        self._previous = previous.begun if previous is not None else {}
        if previous is not None:
            self.outcome.statuses.update(previous.outcome.statuses)
            self.outcome.reasons.update(previous.outcome.reasons)
        self._trials: dict[str, TrialWriter] = {}
        self._closed = False

    def has_started(self, trial: Trial) -> bool:
        """Whether the trial's run was opened."""
        return trial.trial_id in self._trials

    def has_ended(self, trial: Trial) -> bool:
        """Whether the trial has ended, in this run of the sweep or before."""
        return trial.trial_id in self.outcome.statuses

    def open_trials(self, trials: Iterable[Trial]) -> list[Trial]:
        """The trials that have started but not ended."""
        return [trial for trial in trials if self.has_started(trial) and not self.has_ended(trial)]

    def start(self, trials: Iterable[Trial], pack_id: str) -> None:
        """Open a run for each trial that has none, with its parameters, counts and its method's card."""
        for trial in trials:
            if self.has_started(trial):
                continue
            label = {LABEL_TAG: trial.label or trial.method.name}
            role = {} if trial.method.packable else {WRITES_BASE_TAG: "true"}
            tags = {"loragrid.pack": pack_id, PHASE_TAG: trial.phase, **label, **role, **self._environment}
            tags |= {COST_SHAPE_TAG: cost_shape(trial)} | card_tags(trial.method.card)
            if trial.asked_id:
                tags[ASKED_TAG] = trial.asked_id
            if trial.found:
                tags[FOUND_TAG] = json.dumps(sorted(trial.found))
            writer = self._trials[trial.trial_id] = TrialWriter(trial, self.recorder)
            if trial.trial_id in self._previous:
                writer.resume(tags, self._previous[trial.trial_id])
            else:
                writer.open(tags)

    def write(self, update: PackUpdate) -> None:
        """Record an update of started trials: steps, figures, tags and ends."""
        for trial_id, records in update.records.items():
            if trial_id not in self.outcome.statuses:
                self._trials[trial_id].add_records(records)
        for trial_id, figures in update.figures.items():
            self._trials[trial_id].add_figures(figures)
        for trial_id, tags in update.tags.items():
            self._trials[trial_id].add_tags(tags)
        for trial_id, end in update.ended.items():
            if trial_id not in self.outcome.statuses:
                self.end(self._trials[trial_id].trial, end)

    def end(self, trial: Trial, end: TrialEnd) -> None:
        """Record how a started trial ended; delete its states if it will not continue from them."""
        trial_id = trial.trial_id
        end = self._trials[trial_id].end(end, self.store)
        self.outcome.statuses[trial_id] = end.status
        if end.reason:
            self.outcome.reasons[trial_id] = end.reason
        if end.reason.startswith(DIVERGED):
            # Before the mark of its end: workers that take over do not train it again, and must know why.
            self.store.mark_diverged(trial.setting_id, trial_id)
        if not self._closed:  # an interrupted trial may be resumed later
            self.store.mark_ended(trial_id)
        # A state that violates an invariant is useless: if the trial is trained again, it starts from step 0.
        if self.outcome.is_final(trial_id) or end.reason.startswith(INVARIANT_VIOLATED):
            self.store.delete_states(trial_id)

    def close(self, planned: Iterable[str] = (), cost: SweepCost | None = None, *, is_whole: bool = True) -> None:
        """End the sweep's run and the trials that are still open in it; further calls do nothing.

        planned: ids of trials; if one of them has not ended, the sweep counts as interrupted. cost: recorded with a
        summary. is_whole: False if further trials were to follow; the sweep then counts as interrupted too.
        """
        if self._closed:
            return
        self._closed = True
        is_whole = is_whole and self.outcome.statuses.keys() >= set(planned)
        still_open = self.open_trials(writer.trial for writer in self._trials.values())
        for trial in still_open:
            self.end(trial, TrialEnd(status="KILLED", reason="interrupted"))
        if cost is not None:
            self._summarise(cost)
        failed = "FAILED" in self.outcome.statuses.values()
        interrupted = still_open or not is_whole
        self.recorder.end_sweep("KILLED" if interrupted else "FAILED" if failed else "FINISHED")
        # The states of the other trials stay: a resumed sweep continues from them.
        self.store.delete(trial_id for trial_id in self._trials if self.outcome.is_final(trial_id))

    def _summarise(self, cost: SweepCost) -> None:
        """Record the sweep's summary. A failure is recorded as a tag and does not change how the sweep ends."""
        try:
            self.curves = record_summary(self.recorder, self.recorder.sweep_name, cost)
        except Exception as error:  # from MLflow, a database driver or matplotlib; the trials are already recorded
            self.recorder.log_sweep_summary({}, {"loragrid.summary.problem": f"{type(error).__name__}: {error}"})
