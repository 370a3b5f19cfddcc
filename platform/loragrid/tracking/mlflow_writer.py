"""Carries out recorded operations on an MLflow store, by explicit run ids; each can come twice without harm.

Nothing here touches MLflow's fluent "active run": it is global state, and several trials would land in one run.
"""

import os
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from loragrid.tracking.spool import Operation
from loragrid.tracking.store_uri import quiet_store
from loragrid.trials.tags import KIND_TAG, NOTE_TAG, PARENT_TAG, REASON_TAG, SWEEP_TAG, TRIAL_TAG

SWEEP_ITSELF = ""
"""The key of the sweep's own run among those of its trials."""

# MLflow's own seven retries of up to two minutes each would hold up the end of a sweep for a quarter of an hour.
_QUICK_TO_ANSWER = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_NEVER = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


class StoreWriter:
    """Writes one sweep. An operation has `do`, `run` (a trial's id, or SWEEP_ITSELF), and by `do`:

    start: name, time, parameters, tags (all text). reopen: nothing. metrics: points [key, value, time, step].
    tags: tags. artifacts: files, path. end: status, time. Times are milliseconds since 1970.
    """

    def __init__(self, tracking_uri: str, experiment_id: str, sweep: str) -> None:
        be_quick_to_answer()
        self.experiment_id, self.sweep = experiment_id, sweep
        with quiet_store():
            self._client = MlflowClient(tracking_uri=tracking_uri)
        self.run_ids: dict[str, str] = {}

    def write(self, operation: Operation, files: Path | None = None) -> None:
        """Carry it out; `files` holds those of an artifact operation. Raises what MLflow raises."""
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
                # The client itself splits what is more than MLflow takes at once. A point that is there is left alone.
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
        """The id of a run of this sweep, if the store has it."""
        if key not in self.run_ids:
            own = f"tags.`{TRIAL_TAG}` = '{key}'" if key else f"tags.`{KIND_TAG}` = 'sweep'"
            runs = self._client.search_runs(
                [self.experiment_id],
                f"tags.`{SWEEP_TAG}` = '{self.sweep}' AND {own}",
                order_by=["attributes.start_time DESC"],
                max_results=1,
            )
            if runs:
                self.run_ids[key] = runs[0].info.run_id
        return self.run_ids.get(key)

    def _start(self, operation: Operation) -> None:
        key = operation["run"]
        if self.find_run(key) is None:  # else a program was killed after it had made the run
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
            raise MlflowException(f"there is no run of {key or self.sweep}", error_code=RESOURCE_DOES_NOT_EXIST)
        return run_id


def be_quick_to_answer() -> None:
    """Let MLflow's clients of this process give up soon where a server is away; what the user has set stays."""
    for name, value in _QUICK_TO_ANSWER.items():
        os.environ.setdefault(name, value)


def will_never_be_taken(error: Exception) -> bool:
    """Whether the store understood and refused; everything else may be over in a while."""
    return isinstance(error, MlflowException) and error.error_code in _NEVER
