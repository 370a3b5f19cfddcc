"""Decides which trials of a sweep that was run before are still to be trained."""

from dataclasses import replace

from rich.console import Console

from loragrid.formatting import count_of
from loragrid.planning.plan import Plan
from loragrid.sweep.storage import spool_folder
from loragrid.tracking.previous_run import PreviousSweep, find_previous, identify
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.sync import sync
from loragrid.trials.packing import group_into_packs


def previous_sweep(the_plan: Plan, recorder: Recorder, name: str | None, console: Console) -> PreviousSweep | None:
    """The sweep to resume, after its whole record was delivered to MLflow; None if there is none yet.

    None instead of an error lets a job be restarted unconditionally: with no earlier sweep, --resume starts the first.

    Raises:
        ValueError: the sweep is still running, or MLflow does not accept its record.
    """
    experiment = the_plan.experiment
    sync(spool_folder(experiment), experiment.name)
    previous = find_previous(experiment.name, recorder.tracking_uri, name)
    if previous is None:
        sweep = f"sweep {name!r}" if name else "sweep"
        console.print(
            f"--resume: experiment {experiment.name!r} has no {sweep} yet: this is its first",
            style="yellow",
            highlight=False,
            markup=False,
        )
        return None
    then = ", before the chosen settings are confirmed" if experiment.confirm is not None else ""
    console.print(
        f"{previous.name}: {count_of(len(previous.outcome.statuses), 'trial')} ended, {len(previous.begun)} begun, "
        f"{len(remaining_plan(the_plan, previous).trials)} to be trained{then}",
        highlight=False,
    )
    return previous


def report_previous(the_plan: Plan, recorder: Recorder, console: Console) -> None:
    """Print that an earlier sweep has trained some of these trials, if one has."""
    previous = find_previous(recorder.experiment_name, recorder.tracking_uri, None, whole=False)
    if previous is None:
        return
    done = [trial for trial in the_plan.trials if trial.trial_id in previous.outcome.statuses]
    if previous.begun or len(done) < len(the_plan.trials):
        console.print(
            f"{previous.name} has ended {len(done)} of these {count_of(len(the_plan.trials), 'trial')}; all are "
            "trained again (--resume would train only the rest)",
            style="yellow",
            highlight=False,
        )


def remaining_plan(the_plan: Plan, previous: PreviousSweep, num_places: int = 1) -> Plan:
    """The plan without the trials that have ended.

    The remaining trials stay in their packs, because half-trained members continue together. If trials were added
    since, all remaining trials are packed again, for `num_places` places.
    """
    trials = tuple(trial for trial in the_plan.trials if trial.trial_id not in previous.outcome.statuses)
    if identify(trial.trial_id for trial in the_plan.trials) != previous.trials:
        experiment = the_plan.experiment
        packs = group_into_packs(trials, experiment.pack, num_places, num_workers=experiment.workers.num_workers)
        return replace(the_plan, trials=trials, packs=tuple(packs))
    open_ids = {trial.trial_id for trial in trials}
    packs = [replace(p, trials=tuple(t for t in p.trials if t.trial_id in open_ids)) for p in the_plan.packs]
    return replace(the_plan, trials=trials, packs=tuple(pack for pack in packs if pack.trials))
