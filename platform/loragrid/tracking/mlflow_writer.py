"""Carries out recorded operations on an MLflow store by explicit run ids; an operation may be carried out twice.

Nothing here uses MLflow's "active run", because it is global state: several trials would be written to one run.
"""

import os
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from loragrid.tracking.mlflow_internals import quiet_store
from loragrid.tracking.search import search_runs
from loragrid.tracking.spool import Operation
from loragrid.trials.tags import KIND_TAG, NOTE_TAG, PARENT_TAG, REASON_TAG, SWEEP_TAG, TRIAL_TAG

SWEEP_ITSELF = ""
"""The key of the sweep's own run; the keys of its trials' runs are trial ids."""

# By default MLflow retries seven times, for up to two minutes each: the end of a sweep would take a quarter of an hour.
_FAIL_FAST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_PERMANENT_ERRORS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


class RunNotFoundError(Exception):
    """The store holds no run for an operation."""


class StoreWriter:
    """Writes the runs of one sweep.

    An operation has the fields `do` and `run` (a trial id or `SWEEP_ITSELF`), and further fields that depend on `do`:
    start: name, time, parameters, tags (all text). reopen: none. metrics: points [key, value, time, step].
    tags: tags. artifacts: files, path. end: status, time. Times are milliseconds since 1970.

    run_ids: `run` -> MLflow's run id, for the runs that were found or created.
    """

    def __init__(self, tracking_uri: str, experiment_id: str, sweep: str) -> None:
        fail_fast()
        self.experiment_id, self.sweep = experiment_id, sweep
        with quiet_store():
            self._client = MlflowClient(tracking_uri=tracking_uri)
        self.run_ids: dict[str, str] = {}

    def write(self, operation: Operation, files: Path | None = None) -> None:
        """Carry out an operation. files: the folder of an artifact operation.

        Raises:
            RunNotFoundError: the store has no such run.
            ValueError: the operation is unknown.
            Exception: whatever MLflow or a database driver raises.
        """
        key = operation["run"]
        match operation["do"]:
            case "start":
                self._start(operation)
            case "reopen":
                run = self._client.get_run(self._run_id(key))
                for tag in {REASON_TAG, NOTE_TAG} & run.data.tags.keys() if key != SWEEP_ITSELF else ():
                    self._client.delete_tag(run.info.run_id, tag)
                self._client.update_run(run.info.run_id, status="RUNNING")
            case "metrics":
                points = [Metric(name, value, time, step) for name, value, time, step in operation["points"]]
                # The client splits batches that are too large for one call. MLflow ignores points that it already has.
                self._client.log_batch(self._run_id(key), metrics=points, synchronous=True)
            case "tags":
                self._tag(self._run_id(key), operation["tags"])
            case "artifacts":
                assert files is not None
                self._client.log_artifacts(self._run_id(key), str(files), operation["path"] or None)
            case "end":
                self._client.set_terminated(self._run_id(key), operation["status"], operation["time"])
            case unknown:
                raise ValueError(f"the spool holds an operation {unknown!r}, which this version does not know")

    def find_run(self, key: str) -> str | None:
        """The id of a run of this sweep; None if the store does not have it."""
        if key not in self.run_ids:
            own = f"tags.`{TRIAL_TAG}` = '{key}'" if key else f"tags.`{KIND_TAG}` = 'sweep'"
            condition = f"tags.`{SWEEP_TAG}` = '{self.sweep}' AND {own}"
            run = next(search_runs(self._client, self.experiment_id, condition), None)
            if run is not None:
                self.run_ids[key] = run.info.run_id
        return self.run_ids.get(key)

    def _start(self, operation: Operation) -> None:
        key = operation["run"]
        if self.find_run(key) is None:  # it exists if a program was killed after it had created the run
            tags = dict(operation["tags"])
            if key != SWEEP_ITSELF:
                tags[PARENT_TAG] = self._run_id(SWEEP_ITSELF)
            run = self._client.create_run(self.experiment_id, operation["time"], tags, operation["name"])
            self.run_ids[key] = run.info.run_id
        parameters = [Param(name, value) for name, value in operation["parameters"].items()]
        self._client.log_batch(self._run_id(key), params=parameters, synchronous=True)

    def _tag(self, run_id: str, tags: dict[str, str]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)

    def _run_id(self, key: str) -> str:
        run_id = self.find_run(key)
        if run_id is None:
            raise RunNotFoundError(f"there is no run of {key or self.sweep}")
        return run_id


def fail_fast() -> None:
    """Make the MLflow clients of this process give up soon if a server does not answer; keep the user's settings."""
    for name, value in _FAIL_FAST.items():
        os.environ.setdefault(name, value)


def is_permanent(error: Exception) -> bool:
    """Whether the store will refuse the operation every time; any other error may pass."""
    if isinstance(error, MlflowException):
        return error.error_code in _PERMANENT_ERRORS
    return isinstance(error, RunNotFoundError)
