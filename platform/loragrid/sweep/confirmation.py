"""The second phase of a sweep: chooses each method's setting from the record, and plans its trials with fresh seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loragrid.comparison.phases import split_phases
from loragrid.comparison.selection import choose
from loragrid.comparison.settings import show_setting, tasks_of
from loragrid.comparison.table import NO_CURVES, Comparison, load_comparison
from loragrid.formatting import count_of
from loragrid.planning.placement import Placement
from loragrid.planning.plan import Plan, can_be_confirmed, plan_confirmation
from loragrid.planning.queues import cut_for
from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.record import Sweep
from loragrid.tracking.previous_run import PreviousSweep
from loragrid.trials.confirm import Chosen, fresh_seeds
from loragrid.trials.tags import CONFIRM_CHOICE_TAG
from loragrid.trials.trial import Trial

# Longer than at a sweep's end: without the record nothing can be chosen, and the cluster would have to be found again.
PATIENCE_SECONDS = 60.0
NOTHING_TO_CONFIRM = "no method has a setting that can be chosen, so none was trained again with fresh seeds"


@dataclass(frozen=True, kw_only=True)
class PlannedConfirmation:
    """plan: all trials that confirm, ended or not. chosen: as it is recorded. sentences: what the user must know."""

    plan: Plan
    chosen: Chosen
    sentences: tuple[str, ...]


def plan_from_record(comparison: Comparison, whole_plan: Plan, recorded: Chosen) -> PlannedConfirmation:
    """The trials that confirm each method's chosen setting, by what is recorded of the grid's trials.

    The choice depends on the record of the grid alone, so a resumed sweep chooses as before unless more of its trials
    have finished. If another setting is chosen then, it is confirmed too, and a sentence says so: the verdict always
    rests on the setting that is best by all that is recorded. A method without a setting that can be chosen is named
    and left out; a method that trains nothing is left out, because its figures depend on no seed.

    recorded: the choice of the sweep's earlier runs.

    Raises:
        ValueError: the grid has a seed with which the sweep has confirmed settings.
    """
    assert whole_plan.experiment.confirm is not None
    seeds = check_fresh(whole_plan, recorded)
    tune, _ = split_phases(comparison)
    chosen: list[Trial] = []
    sentences: list[str] = []
    for label, part in tasks_of(tune).items():
        found, words = _choose_trials(part, whole_plan, recorded)
        chosen += found
        sentences += [f"{label}: {sentence}" if label else sentence for sentence in words]
    return PlannedConfirmation(
        plan=plan_confirmation(whole_plan, chosen, seeds),
        chosen=Chosen.of(chosen, seeds),
        sentences=tuple(sentences),
    )


def check_fresh(whole_plan: Plan, recorded: Chosen) -> tuple[int, ...]:
    """The seeds that confirm, those of earlier runs first; empty if the experiment confirms nothing.

    Raises:
        ValueError: the grid has a seed with which the sweep has confirmed settings.
    """
    number = whole_plan.experiment.confirm.seeds if whole_plan.experiment.confirm else 0
    return fresh_seeds({trial.seed for trial in whole_plan.trials}, number, recorded.seeds)


def _choose_trials(part: Comparison, whole_plan: Plan, recorded: Chosen) -> tuple[list[Trial], list[str]]:
    """A trial of each chosen setting on one task; sentences about methods whose choice is missing or has changed."""
    planned = {trial.trial_id: trial for trial in whole_plan.trials}
    selection = choose(part)
    found: list[Trial] = []
    sentences: list[str] = []
    for choice in selection.choices:
        trial = planned.get(choice.setting.trial_ids[min(choice.setting.trial_ids)])
        setting = show_setting(choice.setting)
        if trial is None:
            what = "is best in the record, but the experiment no longer has it: the method is not confirmed"
            sentences.append(f"{choice.method}: {setting} {what}")
        elif can_be_confirmed(whole_plan, trial):
            found.append(trial)
            if recorded.settings and not recorded.has(trial):
                what = "is the choice now, another setting was it in earlier runs of the sweep: it is confirmed too"
                sentences.append(f"{choice.method}: {setting} {what}")
    having = {choice.method for choice in (*selection.choices, *selection.references)}
    missing = [method for method in dict.fromkeys(part.table["method"]) if method not in having]
    sentences += [f"{method}: none of its settings can be chosen, so none is confirmed" for method in missing]
    return found, sentences


class Confirmation:
    """Confirms what a sweep's grid has found, if the experiment says so.

    notify: receives sentences for the user. `plan` is called once, when the grid has been trained.
    """

    def __init__(
        self,
        sweep: Sweep,
        whole_plan: Plan,
        placement: Placement,
        progress: SweepProgress,
        notify: Callable[[str], None],
    ) -> None:
        self.whole_plan = whole_plan
        """The grid's trials and, once they are known, the trials that confirm."""
        self.problem = ""
        """Why nothing is confirmed although the experiment says so; "" if there is no reason."""
        self.is_outstanding = whole_plan.experiment.confirm is not None
        """Whether it is still to be found out which settings to confirm."""
        self._sweep, self._placement, self._progress, self._notify = sweep, placement, progress, notify

    def plan(self) -> Plan | None:
        """The trials that confirm and have not ended; None if there are none, or if the record cannot be read."""
        if not self.is_outstanding:
            return None
        sweep, previous = self._sweep, self._sweep.previous
        try:
            comparison = self._read_record()
        except Exception as error:  # from MLflow, its server or a database driver
            self.problem = f"{_OUTSTANDING} MLflow does not answer ({type(error).__name__})"
            return None
        recorded = previous.chosen if previous is not None else Chosen()
        found = plan_from_record(comparison, self.whole_plan, recorded)
        confirm = cut_for(found.plan, self._placement)
        self.is_outstanding = False
        for sentence in found.sentences:
            self._notify(sentence)
        if not confirm.trials:
            self.problem = NOTHING_TO_CONFIRM
            return None
        self.whole_plan = with_confirmation(self.whole_plan, confirm)
        sweep.recorder.log_sweep_summary({}, {CONFIRM_CHOICE_TAG: found.chosen.to_text()})
        begun = previous.begun if previous is not None else {}
        # States may be left of a sweep of this name whose record was deleted.
        sweep.store.delete(trial.trial_id for trial in confirm.trials if trial.trial_id not in begun)
        self._progress.confirming(
            len(confirm.trials),
            f"confirming {count_of(len(found.chosen.settings), 'setting')} with {len(found.chosen.seeds)} fresh seeds",
            previous.outcome.statuses.keys() & {trial.trial_id for trial in confirm.trials} if previous else (),
        )
        return open_part(confirm, previous)

    def _read_record(self) -> Comparison:
        """The sweep as MLflow holds it. Raises whatever MLflow raises, or TimeoutError if it does not have it whole."""
        recorder = self._sweep.recorder
        if not recorder.deliver(PATIENCE_SECONDS):
            raise TimeoutError
        return load_comparison(recorder.experiment_name, recorder.tracking_uri, self._sweep.name, curves=NO_CURVES)


_OUTSTANDING = "the chosen settings were not trained again with fresh seeds, because the choice needs the record and"


def with_confirmation(whole_plan: Plan, confirm: Plan) -> Plan:
    """One plan of the grid's trials and of those that confirm."""
    return replace(
        whole_plan,
        trials=(*whole_plan.trials, *confirm.trials),
        counts={**whole_plan.counts, **confirm.counts},
        packs=(*whole_plan.packs, *confirm.packs),
        confirm=None,
    )


def open_part(confirm: Plan, previous: PreviousSweep | None) -> Plan | None:
    """The plan without the trials that ended in earlier runs of the sweep; None if there is no other.

    The remaining trials stay in their packs, because half-trained members continue together.
    """
    ended = previous.outcome.statuses if previous is not None else {}

    def still_open(trials: Sequence[Trial]) -> tuple[Trial, ...]:
        return tuple(trial for trial in trials if trial.trial_id not in ended)

    packs = [replace(pack, trials=still_open(pack.trials)) for pack in confirm.packs]
    trials = still_open(confirm.trials)
    return replace(confirm, trials=trials, packs=tuple(p for p in packs if p.trials)) if trials else None


def planned_before(sweep: Sweep, whole_plan: Plan) -> PlannedConfirmation | None:
    """What a sweep with an ended grid has to confirm, by its record; None if the experiment confirms nothing.

    Raises:
        ValueError: see `plan_from_record`.
    """
    if sweep.previous is None or whole_plan.experiment.confirm is None:
        return None
    recorder = sweep.recorder
    comparison = load_comparison(recorder.experiment_name, recorder.tracking_uri, sweep.previous.name, curves=NO_CURVES)
    return plan_from_record(comparison, whole_plan, sweep.previous.chosen)
