"""Reads from MLflow what a report needs besides the comparison: parameters, tags and times of runs, the YAML file."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from loragrid.comparison.experiment_file import EXPERIMENT_FILE, rebuild_experiment
from loragrid.comparison.item_scores import no_progress_bars
from loragrid.comparison.table import Comparison
from loragrid.tracking.mlflow_internals import quiet_store
from loragrid.tracking.search import EARLIEST_FIRST, search_runs
from loragrid.trials.tags import METHOD_TAG, PARENT_TAG

CARD_PREFIX = "loragrid.card."


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """One trial's run. parameters: dotted path -> recorded text. started, ended: seconds since 1970."""

    run_id: str
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    started: float | None
    ended: float | None


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A comparison with the runs of its trials.

    trials: trial id -> run, in the comparison's order. experiment_yaml: the file that repeats the sweep; None if it can
    be neither found nor rebuilt. is_rebuilt: whether the file was rebuilt from recorded parameters. started, ended: the
    times of the sweep, in seconds since 1970. figures: the sweep's own metrics by key.
    """

    comparison: Comparison
    trials: Mapping[str, TrialRun]
    experiment_yaml: str | None
    is_rebuilt: bool
    status: str
    started: float | None
    ended: float | None
    figures: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def cards(self) -> dict[str, dict[str, str]]:
        """Method -> the fields of its card, as its trials recorded them."""
        found: dict[str, dict[str, str]] = {}
        for trial in self.trials.values():
            card = {
                key.removeprefix(CARD_PREFIX): text for key, text in trial.tags.items() if key.startswith(CARD_PREFIX)
            }
            if card:
                found.setdefault(trial.tags.get(METHOD_TAG, ""), card)
        return dict(sorted(found.items()))


def load_record(comparison: Comparison) -> SweepRecord:
    """Read the runs of a comparison. Raises whatever MLflow raises if the store does not answer."""
    with quiet_store():
        client = MlflowClient(tracking_uri=comparison.tracking_uri)
        parent = client.get_run(comparison.sweep_run_id)
        children = f"tags.`{PARENT_TAG}` = '{comparison.sweep_run_id}'"
        found = search_runs(client, comparison.experiment_id, children, EARLIEST_FIRST)
        runs = {run.info.run_id: run for run in found}
        trials = {
            str(trial_id): _trial_run(runs[run_id])
            for trial_id, run_id in zip(comparison.table["trial_id"], comparison.table["run_id"], strict=True)
            if run_id in runs
        }
    kept = read_artifact(comparison.tracking_uri, comparison.sweep_run_id, EXPERIMENT_FILE)
    return SweepRecord(
        comparison=comparison,
        trials=trials,
        experiment_yaml=kept or rebuild_experiment(parent.data.params),
        is_rebuilt=kept is None,
        status=str(parent.info.status),
        started=_seconds(parent.info.start_time),
        ended=_seconds(parent.info.end_time),
        figures=dict(parent.data.metrics),
    )


def _trial_run(run: Run) -> TrialRun:
    return TrialRun(
        run_id=str(run.info.run_id),
        parameters=dict(run.data.params),
        tags=dict(run.data.tags),
        started=_seconds(run.info.start_time),
        ended=_seconds(run.info.end_time),
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def read_artifact(tracking_uri: str, run_id: str, path: str) -> str | None:
    """The text of an artifact of a run; None if the run lacks it, or if MLflow lists it but cannot read it."""
    with quiet_store(), no_progress_bars(), tempfile.TemporaryDirectory() as folder:
        client = MlflowClient(tracking_uri=tracking_uri)
        parent = path.rpartition("/")[0]
        if path not in {artifact.path for artifact in client.list_artifacts(run_id, parent or None)}:
            return None
        try:
            return Path(client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")
        except (OSError, MlflowException):
            return None
