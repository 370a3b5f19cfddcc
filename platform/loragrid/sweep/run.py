"""Runs an experiment: reads rows, checks models, connects to Ray, trains queues with Tune, records it in MLflow."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import ray
from rich.console import Console

from loragrid.comparison.table import NO_CURVES, Comparison, load_comparison
from loragrid.config.experiment import Experiment
from loragrid.planning.dry_run import prepare
from loragrid.planning.early_stopping import early_stopping_notes
from loragrid.planning.placement import Placement, place
from loragrid.planning.plan import Plan
from loragrid.planning.queues import cut_for
from loragrid.planning.row_notes import row_notes
from loragrid.planning.time_estimate import estimate_time
from loragrid.sweep.cluster import check_placement, cluster_nodes, connected_to_ray, warn_of_slow_arithmetic
from loragrid.sweep.confirmation import (
    NOTHING_TO_CONFIRM,
    Confirmation,
    PlannedConfirmation,
    check_fresh,
    open_part,
    planned_before,
    with_confirmation,
)
from loragrid.sweep.model_checks import check_models
from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.ray_internals import check_ray_version
from loragrid.sweep.record import Sweep, open_recorder, open_sweep, record_estimate, record_rows
from loragrid.sweep.resume import previous_sweep, refuse_other_bases, refuse_other_rows, remaining_plan, report_previous
from loragrid.sweep.storage import check_nodes_share, local_folder, spool_folder, trial_store
from loragrid.sweep.timing_history import known_timings, recorded_start
from loragrid.sweep.tune_runner import TuneRunner
from loragrid.tracking.previous_run import PreviousSweep
from loragrid.trials.outcome import SweepOutcome

_SWEEP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A finished sweep: where it is recorded and how its trials ended."""

    plan: Plan
    name: str
    tracking_uri: str
    outcome: SweepOutcome
    report: Path | None = None
    """The sweep's HTML page, a copy of the one in MLflow; None if it could not be written, or if MLflow does not have
    the whole record yet."""
    waiting_record: Path | None = None
    """The folder with the part of the record that MLflow does not have yet; `loragrid sync` delivers it."""
    unconfirmed: str = ""
    """Why no setting was confirmed although the experiment says so; "" if it was, or if nothing is to be confirmed."""
    curves: pd.DataFrame | None = field(default=None, repr=False)
    """All curves as MLflow held them at the sweep's end, if they were read then; see `load_comparison`."""

    @property
    def succeeded(self) -> bool:
        """Whether every trial of the plan finished, or was stopped early as the experiment asks, in both phases."""
        return not self.unconfirmed and all(self.outcome.is_as_planned(trial.trial_id) for trial in self.plan.trials)

    def comparison(self) -> Comparison:
        """The sweep as MLflow holds it."""
        return load_comparison(self.plan.experiment.name, self.tracking_uri, self.name)

    def to_pandas(self) -> pd.DataFrame:
        """One row per trial: how it ended, its axes, its figures."""
        return load_comparison(self.plan.experiment.name, self.tracking_uri, self.name, curves=NO_CURVES).table


def run(
    experiment: Experiment,
    *,
    address: str | None = None,
    name: str | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> SweepResult:
    """Run every trial of the experiment and record it; a trial that fails does not affect the others.

    With `confirm:` in the experiment, each method's chosen setting is then trained again with fresh seeds. The choice
    needs the record; if MLflow does not answer, a resumed sweep chooses and confirms.

    address: the address of a running Ray cluster; "auto" finds the one on this machine. None uses the cluster that this
    process is connected to or was submitted to (`RAY_ADDRESS`); without one, a cluster is started for the sweep.
    name: the name of the sweep; None: the experiment's name with the next free number.
    resume: continue the latest sweep, or the named one. Finished trials stay as they are, unfinished ones continue from
    their saved states, and trials added to the experiment are trained too. If there is no sweep yet, it starts one.

    At the end, the report is in the storage folder and with the sweep's run.

    Raises:
        ValueError: the request cannot be carried out; nothing was started.
        RayStartError: Ray cannot be started, or the cluster cannot be reached; nothing was started.
        SweepInterrupted: SIGINT or SIGTERM was received; trials that were open are recorded as KILLED.
    """
    console = console or Console(quiet=True)
    check_ray_version()
    _check_name(name)
    whole_plan, rows = prepare(experiment, teller(console), _waiting(console))
    for note in row_notes(whole_plan):
        _notifier(console)(f"note: {note}")
    check_models(whole_plan, lambda sentence: _notifier(console)(f"note: {sentence}"))
    tokenized = rows.tokenized
    sweep = _find_sweep(whole_plan, name, resume, console)
    if sweep.previous:
        refuse_other_rows(sweep.previous, whole_plan, tokenized)
        refuse_other_bases(sweep.previous, whole_plan)
        check_fresh(whole_plan, sweep.previous.chosen)
        if not remaining_plan(whole_plan, sweep.previous).trials:
            before = planned_before(sweep, whole_plan)
            if before is None or open_part(before.plan, sweep.previous) is None:
                return _nothing_left(sweep, sweep.previous, whole_plan, before, console)
    with connected_to_ray(address) as is_local:
        placement = _place(whole_plan, is_local, console)
        whole_plan, the_plan = cut_plans(whole_plan, sweep.previous, placement)
        open_sweep(sweep, whole_plan)
        record_rows(sweep.recorder, list(tokenized.values()))
        for note in early_stopping_notes(whole_plan):
            _notifier(console)(f"note: {note}")
        if is_local and sweep.previous is None:
            known = known_timings(the_plan, placement)
            record_estimate(sweep.recorder, estimate_time(the_plan, placement, known, recorded_start(the_plan)))
        references = {key: ray.put(data) for key, data in tokenized.items()}
        with SweepProgress(len(whole_plan.trials), console) as progress:
            grid = {trial.trial_id for trial in whole_plan.trials}
            progress.ended_before(sweep.previous.outcome.statuses.keys() & grid if sweep.previous else ())
            runner = TuneRunner(sweep, the_plan, references, placement, progress)
            confirmation = Confirmation(sweep, whole_plan, placement, progress, _notifier(console))
            outcome = runner.run(confirmation)
    return _ended(sweep, confirmation, outcome, runner.callback.curves, console)


def cut_plans(whole_plan: Plan, previous: PreviousSweep | None, placement: Placement) -> tuple[Plan, Plan]:
    """(Plan of all trials, plan of the trials to be trained now), both with their packs cut for the cluster."""
    whole_plan = cut_for(whole_plan, placement)
    if previous is None:
        return whole_plan, whole_plan
    return whole_plan, remaining_plan(whole_plan, previous, placement.num_packs)


def _check_name(name: str | None) -> None:
    if name is not None and not _SWEEP_NAME.fullmatch(name):
        what = "a sweep's name is used as a folder name: letters, digits, '.', '_' and '-', at most 120"
        raise ValueError(f"--name: {name!r}: {what}, beginning with a letter, a digit or '_'")


def _find_sweep(whole_plan: Plan, name: str | None, resume: bool, console: Console) -> Sweep:
    """The sweep to run, a new one or the one to resume; its run in MLflow is not opened yet."""
    experiment = whole_plan.experiment
    recorder = open_recorder(experiment, _notifier(console))
    previous = previous_sweep(whole_plan, recorder, name, console) if resume else None
    if not resume:
        report_previous(whole_plan, recorder, console)
    name = previous.name if previous else name or recorder.next_sweep_name()
    store = trial_store(experiment, name)
    return Sweep(name=name, experiment=experiment, recorder=recorder, store=store, previous=previous)


def _place(whole_plan: Plan, is_local: bool, console: Console) -> Placement:
    """The sizes of the workers on the connected cluster; checks first that the cluster can run the plan."""
    experiment = whole_plan.experiment
    placement = place(experiment.workers, cluster_nodes())
    check_placement(experiment, placement, is_local, console)
    check_nodes_share(experiment)
    warn_of_slow_arithmetic(whole_plan, placement, console)
    return placement


def _nothing_left(
    sweep: Sweep, previous: PreviousSweep, whole_plan: Plan, confirmed: PlannedConfirmation | None, console: Console
) -> SweepResult:
    """The result of a sweep whose trials all ended in earlier runs."""
    if not (previous.is_finished or previous.begun):
        # The driver was killed after the last trial had ended, but before the sweep had.
        sweep.recorder.resume_sweep(sweep.name, {})
        sweep.recorder.end_sweep("FAILED" if "FAILED" in previous.outcome.statuses.values() else "FINISHED")
        sweep.store.delete(previous.outcome.statuses)
    return SweepResult(
        plan=whole_plan if confirmed is None else with_confirmation(whole_plan, confirmed.plan),
        name=sweep.name,
        tracking_uri=sweep.recorder.tracking_uri,
        outcome=previous.outcome,
        report=_report(sweep, console),
        unconfirmed=NOTHING_TO_CONFIRM if confirmed is not None and not confirmed.plan.trials else "",
    )


def _ended(
    sweep: Sweep, confirmation: Confirmation, outcome: SweepOutcome, curves: pd.DataFrame | None, console: Console
) -> SweepResult:
    """The result of a sweep that has just ended, with its report if MLflow has the whole record."""
    waiting = None if sweep.recorder.is_delivered else spool_folder(sweep.experiment) / sweep.name
    return SweepResult(
        plan=confirmation.whole_plan,
        name=sweep.name,
        tracking_uri=sweep.recorder.tracking_uri,
        outcome=outcome,
        report=_report(sweep, console, curves) if waiting is None else None,
        waiting_record=waiting,
        unconfirmed=confirmation.problem,
        curves=curves,
    )


def _report(sweep: Sweep, console: Console, curves: pd.DataFrame | None = None) -> Path | None:
    from loragrid.report.files import leave_report  # imports scipy and jinja, needed only at a sweep's end

    folder = local_folder(sweep.experiment)
    return leave_report(
        sweep.experiment.name, sweep.recorder.tracking_uri, sweep.name, folder, _notifier(console), curves=curves
    )


def teller(console: Console) -> Callable[[str], None]:
    """Prints sentences unchanged on the console."""

    def tell(sentence: str) -> None:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    return tell


def _waiting(console: Console) -> Callable[[str], None]:
    """Tells on stderr what is being waited for, unless the caller wants no output."""
    return (lambda sentence: None) if console.quiet else teller(Console(stderr=True))


def _notifier(console: Console) -> Callable[[str], None]:
    def tell(sentence: str) -> None:
        console.print(sentence, style="yellow", highlight=False, markup=False, soft_wrap=True)

    return tell
