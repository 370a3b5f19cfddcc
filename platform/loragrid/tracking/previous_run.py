"""Reads from MLflow how far a previous run of a sweep got."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from loragrid.tracking.mlflow_internals import quiet_store
from loragrid.tracking.recorded_base import RecordedBase
from loragrid.tracking.search import search_runs
from loragrid.trials.confirm import Chosen
from loragrid.trials.outcome import INVARIANT_VIOLATED, SweepOutcome
from loragrid.trials.tags import (
    ASKED_TAG,
    CONFIRM_CHOICE_TAG,
    DATA_DIGEST_TAG,
    KIND_TAG,
    MADE_FROM_TAG,
    PARENT_TAG,
    REASON_TAG,
    SWEEP_TAG,
    TRIAL_TAG,
    WEIGHTS_TAG,
)

TRIALS_TAG = "loragrid.trials"
RESUMED_TAG = "loragrid.resumed"
EVALUATED = ("eval/loss", "forgetting/loss")
"""The curves from which a trial's figures are computed at its end."""


@dataclass(frozen=True, kw_only=True)
class PreviousTrial:
    """The record of a trial that did not finish and is to be continued.

    last_step: -1 if no step is recorded. evaluations: records with `step`, and `eval/loss` or `forgetting/loss`.
    figures: keys of the recorded metrics with one value per trial. tags: the tags of its run.
    """

    last_step: int
    evaluations: list[dict[str, float]]
    figures: frozenset[str]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecordedRows:
    """The rows of a trial: their digest, and what they were made from (empty in old records).

    asked_id: see `Trial.asked_id`; "" for a trial whose length is in steps.
    """

    digest: str
    made_from: Mapping[str, Any] = field(default_factory=dict)
    asked_id: str = ""


@dataclass(frozen=True, kw_only=True)
class PreviousSweep:
    """A sweep that was run before.

    outcome: the trials that need no further training. begun: the other trials that have a run.
    trials: identifies the planned trials, see `identify`. num_resumed: how often the sweep was resumed. rows: trial id
    -> its rows, and bases: -> its base, for trials that a worker has started. chosen: the settings that it confirms,
    if they are recorded.
    """

    name: str
    trials: str
    num_resumed: int
    is_finished: bool
    outcome: SweepOutcome
    begun: Mapping[str, PreviousTrial]
    chosen: Chosen = field(default_factory=Chosen)
    rows: Mapping[str, RecordedRows] = field(default_factory=dict)
    bases: Mapping[str, RecordedBase] = field(default_factory=dict)


def identify(trial_ids: Iterable[str]) -> str:
    """A digest of a set of trials; it does not depend on their order."""
    return hashlib.sha256("\n".join(sorted(trial_ids)).encode()).hexdigest()


def find_previous(
    experiment_name: str, tracking_uri: str, sweep: str | None, *, whole: bool = True
) -> PreviousSweep | None:
    """The latest sweep of an experiment, or its sweep of that name; None if there is none.

    whole: False skips the curves of unfinished trials, which take most of the time.
    """
    with quiet_store():
        client = MlflowClient(tracking_uri=tracking_uri)
        experiment = client.get_experiment_by_name(experiment_name)
        if experiment is None:
            return None
        sweeps = search_runs(client, experiment.experiment_id, f"tags.`{KIND_TAG}` = 'sweep'")
        parent = next((run for run in sweeps if sweep in (None, _name(run), run.info.run_name)), None)
        if parent is None:
            return None
        outcome, begun, rows, bases = SweepOutcome(), {}, {}, {}
        for run in search_runs(client, experiment.experiment_id, f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"):
            trial_id, reason = run.data.tags[TRIAL_TAG], run.data.tags.get(REASON_TAG, "")
            if DATA_DIGEST_TAG in run.data.tags:
                made_from = json.loads(run.data.tags.get(MADE_FROM_TAG, "{}"))
                rows[trial_id] = RecordedRows(
                    digest=run.data.tags[DATA_DIGEST_TAG],
                    made_from=made_from,
                    asked_id=run.data.tags.get(ASKED_TAG, ""),
                )
            if WEIGHTS_TAG in run.data.tags and "model.name" in run.data.params:
                bases[trial_id] = RecordedBase.of(run)
            ended = SweepOutcome(statuses={trial_id: run.info.status}, reasons={trial_id: reason} if reason else {})
            if ended.is_final(trial_id):
                outcome.statuses |= ended.statuses
                outcome.reasons |= ended.reasons
            else:
                begun[trial_id] = _read(client, run) if whole else _NOTHING
        tags = parent.data.tags
        return PreviousSweep(
            name=_name(parent),
            trials=tags.get(TRIALS_TAG, ""),
            num_resumed=int(tags.get(RESUMED_TAG, "0")),
            is_finished=parent.info.status == "FINISHED",
            outcome=outcome,
            begun=begun,
            chosen=Chosen.from_text(tags.get(CONFIRM_CHOICE_TAG, "")),
            rows=rows,
            bases=bases,
        )


_NOTHING = PreviousTrial(last_step=-1, evaluations=[], figures=frozenset())


def _name(parent: Run) -> str:
    """The name by which a sweep's states and runs are found; users can rename the run on MLflow's pages."""
    return parent.data.tags.get(SWEEP_TAG, str(parent.info.run_name))


def _read(client: MlflowClient, run: Run) -> PreviousTrial:
    if run.data.tags.get(REASON_TAG, "").startswith(INVARIANT_VIOLATED):
        # The trial starts from step 0. Its new values replace the old ones, because the last value of a step counts.
        return replace(_NOTHING, tags=dict(run.data.tags))
    keys = [key for key in ("train/loss", *EVALUATED) if key in run.data.metrics]
    curves = {key: client.get_metric_history(run.info.run_id, key) for key in keys}
    steps = [point.step for points in curves.values() for point in points]
    return PreviousTrial(
        last_step=max(steps, default=-1),
        evaluations=[{"step": point.step, key: point.value} for key in EVALUATED for point in curves.get(key, [])],
        figures=frozenset(key for key in run.data.metrics if not key.startswith(("train/", "eval/"))),
        tags=dict(run.data.tags),
    )
