"""Reads from MLflow how far an earlier run of a sweep has come."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.entities import PagedList

from loragrid.tracking.store_uri import quiet_store
from loragrid.trials.outcome import INVARIANT_VIOLATED, SweepOutcome
from loragrid.trials.tags import KIND_TAG, PARENT_TAG, REASON_TAG, SWEEP_TAG, TRIAL_TAG

TRIALS_TAG = "loragrid.trials"
RESUMED_TAG = "loragrid.resumed"


@dataclass(frozen=True, kw_only=True)
class PreviousTrial:
    """What MLflow holds of a trial that did not come to its end, and is gone on with.

    last_step: -1 where no step is recorded. eval_losses: as records. figures: the keys of what it has once.
    tags: its run's.
    """

    last_step: int
    eval_losses: list[dict[str, float]]
    figures: frozenset[str]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PreviousSweep:
    """A sweep that was run before; `outcome` holds the trials that need not be trained again, `begun` the others.

    trials: what identifies all the trials that it was to train. num_resumed: how often it was taken up again.
    """

    name: str
    trials: str
    num_resumed: int
    is_finished: bool
    outcome: SweepOutcome
    begun: Mapping[str, PreviousTrial]


def identify(trial_ids: Iterable[str]) -> str:
    """A text that two sets of trials share only if they are the same."""
    return hashlib.sha256("\n".join(sorted(trial_ids)).encode()).hexdigest()


def find_previous(
    experiment_name: str, tracking_uri: str, sweep: str | None, *, whole: bool = True
) -> PreviousSweep | None:
    """The latest sweep of an experiment, or the one of that name; None where there is none.

    Without `whole`, the curves of unfinished trials are not read.
    """
    with quiet_store():
        client = MlflowClient(tracking_uri=tracking_uri)
        experiment = client.get_experiment_by_name(experiment_name)
        if experiment is None:
            return None
        sweeps = _runs(client, experiment.experiment_id, f"tags.`{KIND_TAG}` = 'sweep'")
        parent = next((run for run in sweeps if sweep in (None, _name(run), run.info.run_name)), None)
        if parent is None:
            return None
        outcome, begun = SweepOutcome(), {}
        for run in _runs(client, experiment.experiment_id, f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"):
            trial_id, reason = run.data.tags[TRIAL_TAG], run.data.tags.get(REASON_TAG, "")
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
        )


_NOTHING = PreviousTrial(last_step=-1, eval_losses=[], figures=frozenset())


def _name(parent: Run) -> str:
    """The name under which a sweep's states and runs are found, also where its run was renamed on MLflow's pages."""
    return parent.data.tags.get(SWEEP_TAG, str(parent.info.run_name))


def _read(client: MlflowClient, run: Run) -> PreviousTrial:
    if run.data.tags.get(REASON_TAG, "").startswith(INVARIANT_VIOLATED):
        # It begins anew, and what it says then takes the place of its spoiled curve: of a step the last value counts.
        return replace(_NOTHING, tags=dict(run.data.tags))
    curves = {key: client.get_metric_history(run.info.run_id, key) for key in ("train/loss", "eval/loss")}
    steps = [point.step for points in curves.values() for point in points]
    return PreviousTrial(
        last_step=max(steps, default=-1),
        eval_losses=[{"step": point.step, "eval/loss": point.value} for point in curves["eval/loss"]],
        figures=frozenset(key for key in run.data.metrics if not key.startswith(("train/", "eval/"))),
        tags=dict(run.data.tags),
    )


def _runs(client: MlflowClient, experiment_id: str, condition: str) -> Iterator[Run]:
    """All runs that meet a condition, the latest first."""
    token = None
    while True:
        page: PagedList[Run] = client.search_runs(
            [experiment_id], condition, order_by=["attributes.start_time DESC"], max_results=1000, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return
