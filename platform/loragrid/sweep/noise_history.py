"""Records how noisy a sweep was, and finds the noise of the latest sweep on the same base and task."""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loragrid.comparison.noise_floor import Noise
from loragrid.config.local_path import local_path
from loragrid.trials.metrics import (
    NOISE_GROUPS,
    NOISE_LEVEL,
    NOISE_OF_ROWS,
    NOISE_OF_ROWS_BY_SEED,
    NOISE_OF_SEEDS,
    NOISE_ROWS,
    NOISE_SEEDS,
)
from loragrid.trials.tags import KIND_TAG

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loragrid.trials.trial import Trial


class Estimate(Protocol):
    """A method's mean figure, as a comparison of methods estimates it."""

    @property
    def mean(self) -> float: ...


class Measured(Protocol):
    """The part of a comparison of methods that says how noisy its sweep was."""

    @property
    def seed_deviation(self) -> float: ...
    @property
    def row_deviation(self) -> float: ...
    @property
    def row_seed_deviation(self) -> float: ...
    @property
    def effective_groups(self) -> float: ...
    @property
    def num_seeds(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def estimates(self) -> "Sequence[Estimate]": ...


@dataclass(frozen=True, kw_only=True)
class RecordedNoise:
    """The noise of a recorded sweep. level: the mean figure of its methods. groups_per_row: effective, at most 1."""

    sweep: str
    noise: Noise
    level: float
    groups_per_row: float


def noise_metrics(result: Measured) -> dict[str, float]:
    """Metrics of a sweep's run with which the next `loragrid plan` predicts its noise floor.

    Empty if the sweep cannot say how noisy it was: it has one seed or one method, or every row has the same figure.
    """
    found = {
        NOISE_OF_SEEDS: result.seed_deviation,
        NOISE_OF_ROWS: result.row_deviation,
        NOISE_OF_ROWS_BY_SEED: result.row_seed_deviation,
        NOISE_GROUPS: result.effective_groups,
        NOISE_SEEDS: float(result.num_seeds),
        NOISE_ROWS: float(result.num_rows),
    }
    if result.num_seeds < 2 or len(result.estimates) < 2 or not all(map(math.isfinite, found.values())):
        return {}
    if not result.row_deviation > 0:
        return {}
    return found | {NOISE_LEVEL: sum(estimate.mean for estimate in result.estimates) / len(result.estimates)}


def recorded_noise(trial: "Trial", storage: str, tracking_uri: str | None) -> RecordedNoise | None:
    """The noise of the latest sweep in the store with the trial's model, data and kind of task; None if there is none.

    MLflow is not imported if the store does not exist. storage, tracking_uri: as the experiment file has them.
    """
    elsewhere = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "://" in storage
    if not elsewhere and not local_path("storage.path", storage, to_be_written=True).is_dir():
        return None
    from loragrid.tracking.store_uri import default_tracking_uri, sqlite_path

    try:
        uri = default_tracking_uri(storage, tracking_uri)
    except ValueError:  # a store of another kind
        return None
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return None
    return _latest(trial, uri)


def _latest(trial: "Trial", tracking_uri: str) -> RecordedNoise | None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from loragrid.tracking.mlflow_internals import quiet_store
    from loragrid.tracking.search import LATEST_FIRST, search_experiments

    kind = "" if trial.task is None else str(trial.task.kind)
    wanted = {"model.name": trial.model.name, "data.name": trial.data.name}
    wanted |= {"task.kind": kind} if kind else {"task": "null"}
    if any("'" in value for value in wanted.values()):  # MLflow's search language cannot quote it
        return None
    conditions = [f"tags.`{KIND_TAG}` = 'sweep'", f"metrics.`{NOISE_OF_ROWS}` > 0"]
    conditions += [f"params.`{key}` = '{value}'" for key, value in wanted.items()]
    try:
        with quiet_store():
            client = MlflowClient(tracking_uri=tracking_uri)
            experiments = [experiment.experiment_id for experiment in search_experiments(client)]
            runs = client.search_runs(experiments, " and ".join(conditions), order_by=[LATEST_FIRST], max_results=1)
    except (MlflowException, ValueError):  # the store does not answer, or is of another kind
        return None
    return _read(str(runs[0].info.run_name), runs[0].data.metrics) if runs else None


def _read(sweep: str, metrics: "Mapping[str, float]") -> RecordedNoise | None:
    """The noise in the metrics of a sweep's run; None if one is missing, as after a record that was cut off."""
    try:
        return RecordedNoise(
            sweep=sweep,
            noise=Noise.measured(
                seed_deviation=metrics[NOISE_OF_SEEDS],
                row_deviation=metrics[NOISE_OF_ROWS],
                row_seed_deviation=metrics[NOISE_OF_ROWS_BY_SEED],
                num_seeds=int(metrics[NOISE_SEEDS]),
            ),
            level=metrics[NOISE_LEVEL],
            groups_per_row=min(1.0, metrics[NOISE_GROUPS] / metrics[NOISE_ROWS]),
        )
    except KeyError:
        return None
