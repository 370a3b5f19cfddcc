"""Writes a sweep into MLflow: one parent run, one child run per trial, from one process, by explicit run ids.

Nothing here touches MLflow's fluent "active run": it is global state, and several trials would land in one run.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, Metric, Param, RunTag, ViewType

from loragrid.glossary import sweep_note
from loragrid.local_path import local_path

Scalar = str | int | float | bool | None
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# What MLflow takes in one value; a longer one it would refuse.
MAX_PARAMETER_LENGTH = 6000
MAX_TAG_LENGTH = 8000

PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
KIND_TAG = "loragrid.kind"
SWEEP_TAG = "loragrid.sweep"
TRIAL_TAG = "loragrid.trial_id"
METHOD_TAG = "loragrid.method"
REASON_TAG = "loragrid.reason"
QUESTION_TAG = "loragrid.question"


def default_tracking_uri(storage_path: str, configured: str | None) -> str:
    """The configured URI, else `MLFLOW_TRACKING_URI`, else an SQLite file in the storage folder.

    ValueError: the URI is a plain folder (MLflow refuses those since 3.13) or SQLite without a file, or nothing is
    configured and the storage is remote, where SQLite cannot live, or has a name that is another's in a URI.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        origin = tracking_origin(configured)
        if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
            raise ValueError(
                f"{origin}: {uri!r} is a folder, and MLflow keeps no store in a plain folder; "
                "allowed: an http(s):// server or a database such as sqlite:////absolute/path/mlflow.db"
            )
        path = sqlite_path(uri)
        if uri.startswith("sqlite:") and (
            path is None or path.name == ":memory:" or local_path(origin, str(path)).is_dir()
        ):
            # Without a file MLflow writes artifacts to wherever the program was started.
            raise ValueError(f"{origin}: {uri!r} names no file; allowed: such as sqlite:////absolute/path/mlflow.db")
        return uri
    if "://" in storage_path:
        raise ValueError(
            f"storage.path: {storage_path!r} is remote and cannot hold MLflow's SQLite file; "
            "set tracking.uri to a server (http://...) or to a local sqlite:////absolute/path/mlflow.db"
        )
    folder = local_path("storage.path", storage_path).resolve()
    if {"?", "%"} & set(str(folder)):
        raise ValueError(
            f"storage.path: {str(folder)!r}: MLflow's SQLite file would land elsewhere, because ? and % have a meaning "
            "of their own in its URI; allowed: a folder without them, or tracking.uri set"
        )
    return f"sqlite:///{folder / 'mlflow.db'}"


def tracking_origin(configured: str | None) -> str:
    """What decided on the tracking URI: a key of the experiment file, or the environment."""
    if configured:
        return "tracking.uri"
    return "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "storage.path"


def tracking_ui_command(uri: str, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves MLflow's own pages on the store.

    ValueError: `uri` is a server, which serves its pages itself.
    """
    if uri.startswith(("http://", "https://")):
        raise ValueError(f"tracking URI {uri} is a server with its own pages: open it in a browser")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    path = sqlite_path(uri)
    if path is not None:
        # Without this, MLflow makes a folder `mlartifacts` wherever the command is run.
        command += ["--artifacts-destination", (path.parent / "artifacts").as_uri()]
    # One server process is enough for one reader, and starts at once.
    return [*command, "--workers", "1"]


def experiment_page(server: str, experiment_id: str) -> str:
    """The address of an experiment's table of runs, for a server such as http://127.0.0.1:5000.

    Without its last part MLflow opens a page about traces of language-model calls, where no run is to be seen.
    """
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def experiment_pages(uri: str, server: str) -> dict[str, str]:
    """Name -> address on `server` of every experiment in the store, the latest first."""
    with quiet_store():
        experiments = MlflowClient(tracking_uri=uri).search_experiments(order_by=["last_update_time DESC"])
    # MLflow makes an empty experiment 0, "Default", in every store.
    return {
        experiment.name: experiment_page(server, experiment.experiment_id)
        for experiment in experiments
        if experiment.experiment_id != "0"
    }


def comparison_page(server: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The address of MLflow's page that lays runs side by side."""
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment_id]))
    return f"{server.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning"


def sqlite_path(uri: str) -> Path | None:
    """The file behind an `sqlite:///` URI; None for every other store."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def card_tags(card: Any) -> dict[str, str]:
    """A method's card (any dataclass of plain fields) as tags `loragrid.card.<field>`."""
    fields = ((field.name, getattr(card, field.name)) for field in dataclasses.fields(card))
    return {f"loragrid.card.{name}": str(value) for name, value in fields if value not in (None, "")}


def format_parameter(value: object) -> str:
    """A parameter as YAML and JSON write it (`null`, `true`, `0.001`), so that it reads back as the value it was."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def parse_parameter(text: str) -> Scalar:
    """The inverse of `format_parameter` for scalars; a list stays the text that it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if value is None or isinstance(value, (str, int, float, bool)) else text


@contextmanager
def quiet_store() -> Iterator[None]:
    """Keeps the two dozen lines that a new SQLite store prints away from the user's terminal; warnings still show."""
    loggers = [logging.getLogger(name) for name in ("mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logging.WARNING, logger.level))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Recorder:
    """The only writer of a sweep: start_sweep, then for every trial start, log, end, and at last end_sweep.

    Without `artifact_root`, artifacts lie beside an SQLite store, and where the server decides otherwise. `clock` gives
    seconds since 1970.
    """

    def __init__(
        self,
        experiment_name: str,
        tracking_uri: str,
        artifact_root: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.experiment_name = experiment_name
        self.tracking_uri = tracking_uri
        self._clock = clock
        self._sweep_name = ""
        self._sweep_run_id: str | None = None
        self._run_ids: dict[str, str] = {}
        self._open_trials: dict[str, None] = {}  # an ordered set
        path = sqlite_path(tracking_uri)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with quiet_store():
            self._client = MlflowClient(tracking_uri=tracking_uri)
            self.experiment_id = self._find_or_create_experiment(_artifact_location(artifact_root, path))

    @property
    def run_ids(self) -> dict[str, str]:
        """MLflow's run id of every trial started, by trial id."""
        return dict(self._run_ids)

    @property
    def sweep_run_id(self) -> str:
        if self._sweep_run_id is None:
            raise ValueError("no sweep is open: call start_sweep first")
        return self._sweep_run_id

    def next_sweep_name(self) -> str:
        """The experiment's name with the next free number: the first sweep is `<experiment>-1`."""
        sweeps, token = 0, None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], f"tags.`{KIND_TAG}` = 'sweep'", ViewType.ALL, 1000, page_token=token
            )
            sweeps, token = sweeps + len(page), page.token
            if not token:
                return f"{self.experiment_name}-{sweeps + 1}"

    def start_sweep(self, name: str, parameters: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """Opens the parent run. The experiment's question goes into the tag `QUESTION_TAG`."""
        if self._sweep_run_id is not None:
            raise ValueError(f"sweep {self._sweep_name!r} is still open: call end_sweep before starting {name!r}")
        note = {NOTE_TAG: sweep_note(tags.get(QUESTION_TAG, ""), self.experiment_name)}
        own = {KIND_TAG: "sweep", SWEEP_TAG: name}
        self._sweep_name = name
        self._sweep_run_id = self._create_run(name, parameters, {**note, **tags, **own})
        return self._sweep_run_id

    def start_trial(self, trial_id: str, parameters: Mapping[str, Scalar], tags: Mapping[str, str]) -> str:
        """Opens a child run named after the trial."""
        if trial_id in self._run_ids:
            raise ValueError(f"trial {trial_id!r} was already started as run {self._run_ids[trial_id]}")
        own = {
            KIND_TAG: "trial",
            SWEEP_TAG: self._sweep_name,
            TRIAL_TAG: trial_id,
            METHOD_TAG: str(parameters.get("method.name", "")),
            PARENT_TAG: self.sweep_run_id,
        }
        run_id = self._create_run(trial_id, parameters, {**tags, **own})
        self._run_ids[trial_id] = run_id
        self._open_trials[trial_id] = None
        return run_id

    def log_records(self, trial_id: str, records: Sequence[Mapping[str, float | int | None]]) -> None:
        """Adds points to the trial's curves.

        A record is `{"step": 3, "train/loss": 2.5, ...}`, with the optional key `timestamp` in seconds since 1970.
        None, NaN and infinity are left out: what was not measured is missing, and SQL would store infinity as 1.8e308.
        """
        now = self._clock()
        metrics = [
            Metric(key, float(value), round(1000 * (record.get("timestamp") or now)), _step(record))
            for record in records
            for key, value in record.items()
            if key not in ("step", "timestamp") and value is not None and math.isfinite(value)
        ]
        # The client itself splits what is more than MLflow takes at once.
        self._client.log_batch(self._run_id(trial_id), metrics=metrics, synchronous=True)

    def log_summary(self, trial_id: str, metrics: Mapping[str, float | None]) -> None:
        """Figures that a trial has once; None and NaN are left out."""
        self.log_records(trial_id, [{**metrics, "step": 0}])

    def tag_trial(self, trial_id: str, tags: Mapping[str, str]) -> None:
        self._log_tags(self._run_id(trial_id), tags)

    def log_artifacts(self, trial_id: str, folder: Path, artifact_path: str) -> None:
        self._client.log_artifacts(self._run_id(trial_id), str(folder), artifact_path)

    def log_sweep_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        self._client.log_artifact(self.sweep_run_id, str(path), artifact_path)

    def end_trial(self, trial_id: str, status: RunStatus, reason: str = "") -> None:
        """Closes the trial's run; `reason` says why it did not finish and stands on the run's page."""
        run_id = self._run_id(trial_id)
        if trial_id not in self._open_trials:
            raise ValueError(f"trial {trial_id!r} has already ended")
        if reason:
            self._log_tags(run_id, {REASON_TAG: reason, NOTE_TAG: f"**{status.lower()}**: {reason}"})
        self._client.set_terminated(run_id, status, round(1000 * self._clock()))
        del self._open_trials[trial_id]

    def end_sweep(self, status: RunStatus) -> None:
        """Closes the parent run, and as KILLED every trial that is still open."""
        for trial_id in tuple(self._open_trials):
            self.end_trial(trial_id, "KILLED", "the sweep ended before this trial")
        self._client.set_terminated(self.sweep_run_id, status, round(1000 * self._clock()))
        self._sweep_run_id = None

    def _find_or_create_experiment(self, artifact_location: str | None) -> str:
        existing: Experiment | None = self._client.get_experiment_by_name(self.experiment_name)
        if existing is None:
            return str(self._client.create_experiment(self.experiment_name, artifact_location))
        if existing.lifecycle_stage != LifecycleStage.ACTIVE:
            raise ValueError(
                f"MLflow experiment {self.experiment_name!r} is deleted in {self.tracking_uri}; choose another name or "
                f"restore it with: mlflow experiments restore --experiment-id {existing.experiment_id}"
            )
        return str(existing.experiment_id)

    def _create_run(self, name: str, parameters: Mapping[str, object], tags: Mapping[str, str]) -> str:
        source = {"mlflow.source.name": "loragrid", "mlflow.source.type": "LOCAL"}
        cut_tags = {key: _cut(value, MAX_TAG_LENGTH) for key, value in {**source, **tags}.items()}
        run = self._client.create_run(self.experiment_id, round(1000 * self._clock()), cut_tags, name)
        params = [Param(key, _cut(format_parameter(value), MAX_PARAMETER_LENGTH)) for key, value in parameters.items()]
        self._client.log_batch(run.info.run_id, params=params, synchronous=True)
        return str(run.info.run_id)

    def _log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        cut = [RunTag(key, _cut(value, MAX_TAG_LENGTH)) for key, value in tags.items()]
        self._client.log_batch(run_id, tags=cut, synchronous=True)

    def _run_id(self, trial_id: str) -> str:
        if trial_id not in self._run_ids:
            raise ValueError(f"trial {trial_id!r} was never started; started: {', '.join(self._run_ids) or 'none'}")
        return self._run_ids[trial_id]


def _artifact_location(artifact_root: str | None, store: Path | None) -> str | None:
    if artifact_root is not None:
        return artifact_root if "://" in artifact_root else Path(artifact_root).expanduser().resolve().as_uri()
    # MLflow's own default would be `./mlruns`, wherever the program happens to be started.
    return (store.parent / "artifacts").as_uri() if store is not None else None


def _step(record: Mapping[str, float | int | None]) -> int:
    step = record.get("step")
    if step is None:
        raise ValueError(f"record {dict(record)} has no step")
    return int(step)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
