"""Runs an experiment: its rows tokenised, Ray connected, its queues on Ray Tune, the record in MLflow."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import ray
from rich.console import Console

from loragrid.comparison.experiment_file import keep_experiment
from loragrid.comparison.table import NO_CURVES, Comparison, load_comparison
from loragrid.config.experiment import DataConfig, Experiment, ModelConfig
from loragrid.config.local_path import reason_of
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.evaluation.task_scorer import task_scorer
from loragrid.formatting import count_of
from loragrid.models.loading import check_weights, load_tokenizer
from loragrid.planning.placement import place
from loragrid.planning.plan import Plan, plan
from loragrid.planning.time_estimate import ESTIMATE_TAG, TimeEstimate, estimate_time
from loragrid.sweep.cluster import check_placement, cluster_nodes, connected_to_ray, warn_of_slow_arithmetic
from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.resume import previous_sweep, remaining_plan, report_previous
from loragrid.sweep.storage import (
    below,
    check_nodes_share,
    check_storage,
    local_folder,
    spool_folder,
    storage_uri,
    trial_store,
)
from loragrid.sweep.timing_history import known_timings, recorded_start
from loragrid.sweep.tune_runner import TuneRunner
from loragrid.tracking.previous_run import RESUMED_TAG, TRIALS_TAG, PreviousSweep, identify
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import default_tracking_uri, tracking_origin
from loragrid.trials.outcome import SweepOutcome
from loragrid.trials.packing import group_into_packs
from loragrid.trials.tags import QUESTION_TAG
from loragrid.worker.checkpoints import TrialStore

_SWEEP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A finished sweep: where it is recorded and how its trials ended."""

    plan: Plan
    name: str
    tracking_uri: str
    outcome: SweepOutcome
    report: Path | None = None
    """The sweep's page, which its run in MLflow has too; None where it could not be written, or not yet."""
    waiting_record: Path | None = None
    """Where what MLflow has not taken yet waits for `loragrid sync`."""
    curves: pd.DataFrame | None = field(default=None, repr=False)
    """All curves as MLflow held them at the sweep's end, where they were read then; see `load_comparison`."""

    @property
    def succeeded(self) -> bool:
        """Whether every trial of the plan finished, or was stopped early as the experiment asks."""
        return all(self.outcome.is_as_planned(trial.trial_id) for trial in self.plan.trials)

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
    """Run every trial of the experiment and record it; a trial that fails leaves the others alone.

    `address` is a running Ray cluster's ("auto" finds the one of this machine); None uses the cluster this process is
    connected to or was submitted to (`RAY_ADDRESS`), and otherwise starts one for the sweep. `name` is the sweep's; by
    default the experiment's with the next free number. `resume` goes on with the latest sweep, or that of the name: its
    finished trials are left alone, unfinished ones go on from where they were saved, those that the experiment has
    beyond it are new; where there is none, it is the first. In the end a report lies in the storage folder and with the
    sweep's run.

    Raises:
        ValueError: the request cannot be carried out; nothing was started.
        SweepInterrupted: SIGINT or SIGTERM has come; what was open is recorded as KILLED.
    """
    from loragrid.report.files import (
        leave_report,  # and scipy and jinja, which nothing needs before a sweep's end
    )

    console = console or Console(quiet=True)

    def tell(sentence: str) -> None:
        console.print(sentence, style="yellow", highlight=False, markup=False, soft_wrap=True)

    if name is not None and not _SWEEP_NAME.fullmatch(name):
        what = "a sweep's name is that of a folder: letters, digits, '.', '_' and '-', at most 120"
        raise ValueError(f"--name: {name!r}: {what}, beginning with a letter, a digit or '_'")
    whole_plan = plan(experiment)
    for model in {trial.model for trial in whole_plan.trials}:
        check_weights(model)
    tokenized = tokenize(whole_plan, console)
    recorder = open_recorder(experiment, tell)
    uri, folder = recorder.tracking_uri, local_folder(experiment)
    previous = previous_sweep(whole_plan, recorder, name, console) if resume else None
    if not resume:
        report_previous(whole_plan, recorder, console)
    name = previous.name if previous else name or recorder.next_sweep_name()
    if previous and not remaining_plan(whole_plan, previous).trials:
        if not (
            previous.is_finished or previous.begun
        ):  # the driver was killed between the last trial's end and its own
            recorder.resume_sweep(name, {})
            recorder.end_sweep("FAILED" if "FAILED" in previous.outcome.statuses.values() else "FINISHED")
            trial_store(experiment, name).delete(previous.outcome.statuses)
        report = leave_report(experiment.name, uri, name, folder, tell)
        return SweepResult(plan=whole_plan, name=name, tracking_uri=uri, outcome=previous.outcome, report=report)
    store = trial_store(experiment, name)
    with connected_to_ray(address) as is_local:
        placement = place(experiment.workers, cluster_nodes())
        check_placement(experiment, placement, is_local, console)
        check_nodes_share(experiment)
        warn_of_slow_arithmetic(whole_plan, placement, console)
        if placement.use_gpu:
            packs = group_into_packs(
                whole_plan.trials, experiment.pack, placement.num_packs, num_workers=placement.num_workers
            )
            whole_plan = replace(whole_plan, packs=tuple(packs))
        the_plan = remaining_plan(whole_plan, previous, placement.num_packs) if previous else whole_plan
        open_sweep(recorder, store, name, whole_plan, previous)
        if is_local and previous is None:
            record_estimate(
                recorder,
                estimate_time(the_plan, placement, known_timings(the_plan, placement), recorded_start(the_plan)),
            )
        rows = {key: ray.put(data) for key, data in tokenized.items()}
        with SweepProgress(len(whole_plan.trials), console) as progress:
            progress.ended_before(previous.outcome.statuses if previous else ())
            rounds = TuneRunner(
                the_plan,
                rows,
                placement,
                recorder,
                store,
                name,
                below(storage_uri(experiment), "ray"),
                progress,
                previous,
            )
            outcome = rounds.run()
    waiting = None if recorder.is_delivered else spool_folder(experiment) / name
    curves = rounds.callback.curves
    return SweepResult(
        plan=whole_plan,
        name=name,
        tracking_uri=uri,
        outcome=outcome,
        report=leave_report(experiment.name, uri, name, folder, tell, curves=curves) if waiting is None else None,
        waiting_record=waiting,
        curves=curves,
    )


def open_sweep(
    recorder: Recorder, store: TrialStore, name: str, whole_plan: Plan, previous: PreviousSweep | None
) -> None:
    """Open the sweep's run, for the first time or again, and forget the states of trials that will not go on."""
    trial_ids = {trial.trial_id for trial in whole_plan.trials}
    tags = {TRIALS_TAG: identify(trial_ids)}
    if previous is None:
        experiment = whole_plan.experiment
        recorder.start_sweep(name, sweep_parameters(experiment), {QUESTION_TAG: experiment.question, **tags})
        keep_experiment(recorder, experiment)
        store.delete(trial_ids)
    else:
        recorder.resume_sweep(name, {RESUMED_TAG: str(previous.num_resumed + 1), **tags})
        store.delete(previous.outcome.statuses)  # the driver may have been killed before it did
        store.reopen(trial_ids)
        keep_experiment(recorder, whole_plan.experiment)  # it may have grown


def record_estimate(recorder: Recorder, estimate: TimeEstimate) -> None:
    """Record what the sweep is expected to take, where all its packs' shapes were timed; measured stands beside it."""
    if estimate.total_seconds is not None:
        metrics = {"sweep/estimated_seconds": estimate.total_seconds}
        recorder.log_sweep_summary(metrics, {ESTIMATE_TAG: ", ".join(estimate.sources)})


def tokenize(the_plan: Plan, console: Console) -> dict[tuple[ModelConfig, DataConfig], TokenizedData]:
    """The rows of every distinct model and data set of the plan; what was skipped is said."""
    tokenized: dict[tuple[ModelConfig, DataConfig], TokenizedData] = {}
    for trial in the_plan.trials:
        key = (trial.model, trial.data)
        if key in tokenized:
            continue
        data = load_data(trial.data, trial.model, load_tokenizer(trial.model))
        tokenized[key] = data
        if trial.task is not None:
            task_scorer(trial.task, trial.model, data)  # what no worker could score is refused here
        skipped = "".join(f"; skipped {count}: {reason}" for reason, count in data.skipped.items() if count)
        tested = f", {len(data.test)} to test" if len(data.test) else ""
        console.print(
            f"data {trial.data.name}: {count_of(len(data.train), 'row')} to train on, {len(data.evaluation)} to "
            f"evaluate{tested}{skipped}",
            highlight=False,
            markup=False,
        )
    return tokenized


def open_recorder(experiment: Experiment, notify: Callable[[str], None] = lambda sentence: None) -> Recorder:
    """The MLflow experiment that this one is recorded in, after it is sure that the storage can be written.

    Raises:
        ValueError: the folder cannot be written, or MLflow cannot open its store.
    """
    uri = default_tracking_uri(experiment.storage.path, experiment.tracking.uri)
    check_storage(experiment)
    try:
        return Recorder(experiment.name, uri, spool_folder=spool_folder(experiment), notify=notify)
    except ValueError:
        raise
    except Exception as error:  # MLflow's, SQLAlchemy's, a database driver's, the system's: a store has them all
        origin = tracking_origin(experiment.tracking.uri)
        raise ValueError(f"{origin}: {uri}: MLflow cannot open its store there: {reason_of(error)}") from error


def sweep_parameters(experiment: Experiment) -> dict[str, object]:
    """The whole experiment, flat, as the parent run records it."""
    flat: dict[str, object] = {}
    for section, value in experiment.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": item for key, item in value.items()}
        else:
            flat[section] = value
    return flat
