"""Decides which trials of a sweep that was run before are still to be trained."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.data.record import shortened
from loragrid.formatting import count_of
from loragrid.models.base_record import compare, record_base
from loragrid.planning.plan import Plan
from loragrid.sweep.storage import spool_folder
from loragrid.tracking.previous_run import PreviousSweep, RecordedRows, find_previous, identify
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.sync import sync
from loragrid.trials.outcome import DIVERGED
from loragrid.trials.packing import group_into_packs
from loragrid.worker.checkpoints import TrialStore


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


def refuse_other_rows(
    previous: PreviousSweep, the_plan: Plan, tokenized: Mapping[tuple[ModelConfig, DataConfig], TokenizedData]
) -> None:
    """Refuse to continue a sweep whose trials were trained, evaluated or tested on other rows than those of now.

    A trial of the plan must have the rows that it had; so must one in epochs, to which other rows give another id. Of
    the other recorded trials, whose settings the experiment no longer names, some must have rows of now: otherwise all
    trials would be new, on other rows.

    Raises:
        ValueError: the rows differ; the message names both digests, and what changed as far as it is recorded.
    """
    in_epochs = {recorded.asked_id: recorded for recorded in previous.rows.values() if recorded.asked_id}
    for trial in the_plan.trials:
        data = tokenized[(trial.model, trial.data)]
        recorded = previous.rows.get(trial.trial_id) or in_epochs.get(trial.asked_id)
        if recorded is not None and recorded.digest != data.digest:
            raise ValueError(_other_rows(previous.name, trial.trial_id, recorded, data))
    of_now = {data.digest for data in tokenized.values()}
    if previous.rows and not any(recorded.digest in of_now for recorded in previous.rows.values()):
        trial_id, recorded = next(iter(previous.rows.items()))
        raise ValueError(_other_rows(previous.name, trial_id, recorded, next(iter(tokenized.values()))))


def refuse_other_bases(previous: PreviousSweep, the_plan: Plan) -> None:
    """Refuse to continue a sweep whose trials were trained on other weights, or another config, than those of now.

    The tokenizer is not compared here: what it does to the rows is (`refuse_other_rows`).

    Raises:
        ValueError: a base of the plan differs from the recorded one; the message says how.
    """
    for model in dict.fromkeys(trial.model for trial in the_plan.trials):
        recorded = {trial_id: base for trial_id, base in previous.bases.items() if base.model == model}
        now = record_base(model) if recorded else None
        for trial_id, base in recorded.items():
            assert now is not None
            changed = [part.text for part in compare(base.record, now) if not part.concerns_tokenizer_only]
            if changed:
                commit = base.record.commit
                same = f"model.revision: {commit} in a new sweep" if commit else "the base of that sweep put back"
                raise ValueError(
                    f"--resume: {previous.name}: its trial {trial_id} was trained on another base than {model.name} "
                    f"now is, and trials on different bases cannot be compared; these differ: {'; '.join(changed)}; "
                    f"allowed: a new sweep (no --resume), or {same}"
                )


def remaining_plan(the_plan: Plan, previous: PreviousSweep, num_places: int = 1) -> Plan:
    """The plan without the trials that have ended.

    The remaining trials stay in their packs, because half-trained members continue together. If trials were added
    since, all remaining trials are packed again, for `num_places` places.
    """
    trials = tuple(trial for trial in the_plan.trials if trial.trial_id not in previous.outcome.statuses)
    if identify(trial.trial_id for trial in the_plan.trials) != previous.trials:
        experiment = the_plan.experiment
        packs = group_into_packs(
            trials,
            experiment.pack,
            num_places,
            num_workers=experiment.workers.num_workers,
            early_stopping=experiment.early_stopping,
        )
        return replace(the_plan, trials=trials, packs=tuple(packs))
    open_ids = {trial.trial_id for trial in trials}
    packs = [replace(p, trials=tuple(t for t in p.trials if t.trial_id in open_ids)) for p in the_plan.packs]
    return replace(the_plan, trials=trials, packs=tuple(pack for pack in packs if pack.trials))


def _other_rows(sweep: str, trial_id: str, recorded: RecordedRows, data: TokenizedData) -> str:
    changed = _changes(recorded.made_from, shortened(data.made_from))
    return (
        f"--resume: {sweep}: its trial {trial_id} has other rows than this experiment now gives (rows digest "
        f"{recorded.digest}, now {data.digest}), and trials on different rows cannot be compared; what changed: "
        f"{changed}; allowed: a new sweep (no --resume), or the rows, keys and version of that sweep"
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two sets of rows were made from differently, in words."""
    if not before:
        return "the sweep is older than groups of rows, and LoraGrid split rows by another rule then"
    words = {
        "format": "LoraGrid's rule by which rows are split and turned into tokens",
        "sources": "the content of the data",
        "tokenizer": "the tokenizer",
        "versions": "the versions of libraries",
        "code": "LoraGrid's code that turns rows into tokens",
        "files": "the content of files that the data section names",
    }
    found = [
        f"{words.get(key, f'data.{key}')} ({before[key]} then, {now[key]} now)"
        for key in before
        if key in now and before[key] != now[key]
    ]
    return ", ".join(found) or "nothing that was recorded then"


def mark_diverged_before(store: TrialStore, the_plan: Plan, previous: PreviousSweep) -> None:
    """Tell the workers of a resumed sweep which settings diverged in a seed: at a rung these settings are last.

    the_plan: of all trials, ended or not. The earlier run deleted its marks of trials that are not trained again.
    """
    diverged = {trial_id for trial_id, reason in previous.outcome.reasons.items() if reason.startswith(DIVERGED)}
    if not diverged or the_plan.experiment.early_stopping is None:
        return
    for trial in the_plan.trials:
        if trial.trial_id in diverged:
            store.mark_diverged(trial.setting_id, trial.trial_id)
