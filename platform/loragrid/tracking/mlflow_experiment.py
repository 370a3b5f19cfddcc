"""Finds or creates the MLflow experiment that holds the sweeps of one experiment file."""

import itertools
from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage

from loragrid.tracking.mlflow_internals import quiet_store
from loragrid.tracking.mlflow_writer import SWEEP_ITSELF, StoreWriter, fail_fast
from loragrid.tracking.search import search_runs
from loragrid.tracking.store_uri import artifact_location, sqlite_path
from loragrid.trials.tags import KIND_TAG, SWEEP_TAG


class MlflowExperiment:
    """An experiment in the store at `tracking_uri`; creates the store and the experiment if they do not exist.

    artifact_root: see `artifact_location`.

    Raises:
        ValueError: the experiment is deleted in the store.
    """

    def __init__(self, name: str, tracking_uri: str, artifact_root: str | None = None) -> None:
        self.name, self.tracking_uri = name, tracking_uri
        fail_fast()
        path = sqlite_path(tracking_uri)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with quiet_store():
            self._client = MlflowClient(tracking_uri=tracking_uri)
            self.experiment_id = self._find_or_create(artifact_location(artifact_root, path))

    def free_sweep_names(self) -> Iterator[str]:
        """Yield `<experiment>-<number>`, from the number of recorded sweeps plus 1 upwards, without names in use."""
        names: set[str] = set()
        num_sweeps = 0
        for run in search_runs(self._client, self.experiment_id, f"tags.`{KIND_TAG}` = 'sweep'", include_deleted=True):
            names.add(run.data.tags.get(SWEEP_TAG, str(run.info.run_name)))
            num_sweeps += 1
        numbered = (f"{self.name}-{number}" for number in itertools.count(num_sweeps + 1))
        return (name for name in numbered if name not in names)

    def has_sweep(self, name: str) -> bool:
        """Whether MLflow holds a sweep of that name."""
        return self.writer(name).find_run(SWEEP_ITSELF) is not None

    def writer(self, sweep: str) -> StoreWriter:
        """A writer for the runs of one sweep."""
        return StoreWriter(self.tracking_uri, self.experiment_id, sweep)

    def _find_or_create(self, location: str | None) -> str:
        existing: Experiment | None = self._client.get_experiment_by_name(self.name)
        if existing is None:
            return str(self._client.create_experiment(self.name, location))
        if existing.lifecycle_stage != LifecycleStage.ACTIVE:
            raise ValueError(
                f"MLflow experiment {self.name!r} is deleted in {self.tracking_uri}; choose another name or "
                f"restore it with: mlflow experiments restore --experiment-id {existing.experiment_id}"
            )
        return str(existing.experiment_id)
