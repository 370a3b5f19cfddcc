"""Records a sweep: one parent run and one child run per trial, on their way to MLflow through a spool on disk."""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, ViewType

from loragrid.formatting import count_of
from loragrid.tracking.delivery import Delivery
from loragrid.tracking.mlflow_writer import SWEEP_ITSELF, StoreWriter, be_quick_to_answer
from loragrid.tracking.pages import trials_page
from loragrid.tracking.spool import Operation, Spool, spools_in
from loragrid.tracking.store_uri import (
    MAX_PARAMETER_LENGTH,
    MAX_TAG_LENGTH,
    RunStatus,
    Scalar,
    artifact_location,
    cut,
    format_parameter,
    quiet_store,
    sqlite_path,
)
from loragrid.trials.metrics import sweep_note
from loragrid.trials.tags import KIND_TAG, METHOD_TAG, NOTE_TAG, QUESTION_TAG, REASON_TAG, SWEEP_TAG, TRIAL_TAG

PATIENCE_SECONDS = 20.0
"""How long the end of a sweep waits for a store that fails."""


class Recorder:
    """The only writer of a sweep: start_sweep, then for every trial start, log, end, and at last end_sweep.

    Nothing waits for MLflow: what is to be recorded is on disk, under `spool_folder`, when a method returns, and is
    delivered by a thread every two seconds, each run in its order. Without `spool_folder` the spool is a temporary one.
    Without `artifact_root`, artifacts lie beside an SQLite store, and where the server decides otherwise. `clock` gives
    seconds since 1970; `notify` is told when the store fails and comes back.
    """

    def __init__(
        self,
        experiment_name: str,
        tracking_uri: str,
        artifact_root: str | None = None,
        *,
        spool_folder: Path | None = None,
        clock: Callable[[], float] = time.time,
        notify: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.experiment_name, self.tracking_uri = experiment_name, tracking_uri
        self.is_delivered = True
        """False after a sweep whose record MLflow has not taken whole: `spool` holds the rest."""
        self.spool_folder = spool_folder
        self._clock, self._notify = clock, notify
        self._sweep_name = ""
        self._last_start = 0
        self._known_trials: set[str] = set()
        self._open_trials: dict[str, None] = {}  # an ordered set
        self._spool: Spool | None = None
        be_quick_to_answer()
        path = sqlite_path(tracking_uri)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with quiet_store():
            self._client = MlflowClient(tracking_uri=tracking_uri)
            self.experiment_id = self._find_or_create_experiment(artifact_location(artifact_root, path))

    @property
    def run_ids(self) -> dict[str, str]:
        """MLflow's run id of every trial of the sweep that it knows, by trial id."""
        self.deliver()
        return {key: run_id for key, run_id in self._writer.run_ids.items() if key != SWEEP_ITSELF}

    @property
    def sweep_name(self) -> str:
        """The sweep that is, or was last, recorded; "" before the first."""
        return self._sweep_name

    @property
    def sweep_run_id(self) -> str:
        """MLflow's run id of the sweep.

        Raises:
            ValueError: no sweep was started, or MLflow has not heard of it yet.
        """
        if not self._sweep_name:
            raise ValueError("no sweep is open: call start_sweep first")
        self.deliver()
        run_id = self._writer.find_run(SWEEP_ITSELF)
        if run_id is None:
            raise ValueError(f"MLflow has not heard of sweep {self._sweep_name!r} yet")
        return run_id

    def deliver(self, patience_seconds: float = PATIENCE_SECONDS) -> bool:
        """Wait until MLflow has all that was recorded; False if it has not answered for so long."""
        return self._spool is None or self._delivery.wait(patience_seconds)

    def next_sweep_name(self) -> str:
        """The experiment's name with the next free number: the first sweep is `<experiment>-1`."""
        names: set[str] = set()
        num_sweeps, token = 0, None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], f"tags.`{KIND_TAG}` = 'sweep'", ViewType.ALL, 1000, page_token=token
            )
            names |= {run.data.tags.get(SWEEP_TAG, str(run.info.run_name)) for run in page}
            num_sweeps, token = num_sweeps + len(page), page.token
            if not token:
                break
        numbered = (f"{self.experiment_name}-{number}" for number in itertools.count(num_sweeps + 1))
        # MLflow may not have heard yet of a sweep whose record waits.
        return next(name for name in numbered if name not in names and not self._waits(name))

    def start_sweep(self, name: str, parameters: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the parent run. The experiment's question goes into the tag `QUESTION_TAG`.

        Raises:
            ValueError: the experiment has a sweep of that name, another is open, or another program records this one.
        """
        if self._spool is None and self._waits(name):
            raise ValueError(
                f"--name: the record of a sweep {name!r} waits in {self.spool_folder} for MLflow; allowed: `loragrid "
                "sync` and then --resume, or another name"
            )
        if self._spool is None and StoreWriter(self.tracking_uri, self.experiment_id, name).find_run(SWEEP_ITSELF):
            raise ValueError(
                f"--name: experiment {self.experiment_name!r} has a sweep {name!r} already; allowed: --resume to go on "
                "with it, or another name"
            )
        self._open(name)
        note = {
            NOTE_TAG: sweep_note(
                tags.get(QUESTION_TAG, ""),
                self.experiment_name,
                trials=trials_page(".", self.experiment_id, name),
                charts=trials_page(".", self.experiment_id, name, charts=True),
            )
        }
        own = {KIND_TAG: "sweep", SWEEP_TAG: name}
        self._start_run(SWEEP_ITSELF, name, parameters, {**note, **tags, **own})

    def resume_sweep(self, name: str, tags: Mapping[str, str]) -> None:
        """Go on recording a sweep that has ended, or whose program has died."""
        self._open(name)
        self._record("reopen", SWEEP_ITSELF)
        if tags:
            self._log_tags(SWEEP_ITSELF, tags)

    def start_trial(
        self, trial_id: str, parameters: Mapping[str, Scalar], tags: Mapping[str, str], *, name: str = ""
    ) -> None:
        """Open the trial's child run, under a name for MLflow's pages; "": its id."""
        self._add_trial(trial_id)
        own = {
            KIND_TAG: "trial",
            SWEEP_TAG: self._sweep_name,
            TRIAL_TAG: trial_id,
            METHOD_TAG: str(parameters.get("method.name", "")),
        }
        self._start_run(trial_id, name or trial_id, parameters, {**tags, **own})

    def resume_trial(self, trial_id: str, tags: Mapping[str, str]) -> None:
        """Go on with the run of a trial that did not finish."""
        self._add_trial(trial_id)
        self._record("reopen", trial_id)
        self._log_tags(trial_id, tags)

    def log_records(self, trial_id: str, records: Sequence[Mapping[str, float | int | None]]) -> None:
        """Add points to the trial's curves.

        A record is `{"step": 3, "train/loss": 2.5, ...}`, with the optional key `timestamp` in seconds since 1970.
        None, NaN and infinity are left out: what was not measured is missing, and SQL would store infinity as 1.8e308.
        """
        self._started(trial_id)
        now = self._clock()
        points = [
            [key, float(value), round(1000 * (record.get("timestamp") or now)), _step(record)]
            for record in records
            for key, value in record.items()
            if key not in ("step", "timestamp") and value is not None and math.isfinite(value)
        ]
        if points:
            self._record("metrics", trial_id, points=points)

    def log_summary(self, trial_id: str, metrics: Mapping[str, float | None]) -> None:
        """Figures that a trial has once; None and NaN are left out."""
        self.log_records(trial_id, [{**metrics, "step": 0}])

    def tag_trial(self, trial_id: str, tags: Mapping[str, str]) -> None:
        """Add tags to a trial's run, or change them."""
        self._log_tags(self._started(trial_id), tags)

    def log_artifacts(self, trial_id: str, folder: Path, artifact_path: str) -> None:
        """Keep the files of a folder with the trial's run."""
        self._record("artifacts", self._started(trial_id), files=self._keep_files(folder), path=artifact_path)

    def log_sweep_summary(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Figures and tags of the sweep's own run; not finite ones are left out."""
        now = round(1000 * self._clock())
        points = [[key, float(value), now, 0] for key, value in metrics.items() if math.isfinite(value)]
        if points:
            self._record("metrics", SWEEP_ITSELF, points=points)
        if tags:
            self._log_tags(SWEEP_ITSELF, tags)

    def log_sweep_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Keep a file with the sweep's run."""
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / path.name).write_bytes(path.read_bytes())
            self._record("artifacts", SWEEP_ITSELF, files=self._keep_files(Path(name)), path=artifact_path or "")

    def end_trial(self, trial_id: str, status: RunStatus, reason: str = "") -> None:
        """Close the trial's run; `reason` says why it did not finish and stands on the run's page."""
        self._started(trial_id)
        if trial_id not in self._open_trials:
            raise ValueError(f"trial {trial_id!r} has already ended")
        if reason:
            self._log_tags(trial_id, {REASON_TAG: reason, NOTE_TAG: f"**{status.lower()}**: {reason}"})
        self._record("end", trial_id, status=status, time=self._now())
        del self._open_trials[trial_id]

    def end_sweep(self, status: RunStatus) -> None:
        """Close the parent run, and as KILLED every trial that is still open; then wait for MLflow to have it all."""
        for trial_id in tuple(self._open_trials):
            self.end_trial(trial_id, "KILLED", "the sweep ended before this trial")
        self._record("end", SWEEP_ITSELF, status=status, time=self._now())
        assert self._spool is not None
        self.is_delivered = self._delivery.wait(PATIENCE_SECONDS)
        self._delivery.close()
        if self._spool.num_refused:
            self._notify(
                f"MLflow refused {count_of(self._spool.num_refused, 'part')} of the record for good, kept with its "
                f"reasons, in {self._spool.folder}"
            )
        self._spool.close()
        self._spool = None

    def _waits(self, name: str) -> bool:
        return self.spool_folder is not None and self.spool_folder / name in spools_in(self.spool_folder)

    def _open(self, name: str) -> None:
        if self._spool is not None:
            raise ValueError(f"sweep {self._sweep_name!r} is still open: call end_sweep before starting {name!r}")
        folder = self.spool_folder / name if self.spool_folder else Path(tempfile.mkdtemp(prefix="loragrid-spool-"))
        self._spool = Spool(
            folder, {"tracking_uri": self.tracking_uri, "experiment": self.experiment_name, "sweep": name}
        )
        self._sweep_name = name
        self._known_trials.clear()
        self._writer = StoreWriter(self.tracking_uri, self.experiment_id, name)
        self._delivery = Delivery(self._spool, self._writer, self._notify)

    def _record(self, do: str, run: str, **fields: object) -> None:
        if self._spool is None:
            raise ValueError("no sweep is open: call start_sweep first")
        operation: Operation = {"do": do, "run": run, **fields}
        self._spool.append(operation)
        self._delivery.wake()

    def _keep_files(self, folder: Path) -> str:
        if self._spool is None:
            raise ValueError("no sweep is open: call start_sweep first")
        return self._spool.keep_files(folder)

    def _find_or_create_experiment(self, location: str | None) -> str:
        existing: Experiment | None = self._client.get_experiment_by_name(self.experiment_name)
        if existing is None:
            return str(self._client.create_experiment(self.experiment_name, location))
        if existing.lifecycle_stage != LifecycleStage.ACTIVE:
            raise ValueError(
                f"MLflow experiment {self.experiment_name!r} is deleted in {self.tracking_uri}; choose another name or "
                f"restore it with: mlflow experiments restore --experiment-id {existing.experiment_id}"
            )
        return str(existing.experiment_id)

    def _start_run(self, key: str, name: str, parameters: Mapping[str, object], tags: Mapping[str, str]) -> None:
        source = {"mlflow.source.name": "loragrid", "mlflow.source.type": "LOCAL"}
        self._record(
            "start",
            key,
            name=name,
            time=self._new_start(),
            parameters={k: cut(format_parameter(value), MAX_PARAMETER_LENGTH) for k, value in parameters.items()},
            tags={k: cut(value, MAX_TAG_LENGTH) for k, value in {**source, **tags}.items()},
        )

    def _log_tags(self, key: str, tags: Mapping[str, str]) -> None:
        self._record("tags", key, tags={name: cut(value, MAX_TAG_LENGTH) for name, value in tags.items()})

    def _add_trial(self, trial_id: str) -> None:
        if self._spool is None:
            raise ValueError("no sweep is open: call start_sweep first")
        if trial_id in self._known_trials:
            raise ValueError(f"trial {trial_id!r} was already started")
        self._known_trials.add(trial_id)
        self._open_trials[trial_id] = None

    def _started(self, trial_id: str) -> str:
        if trial_id not in self._known_trials:
            known = ", ".join(sorted(self._known_trials)) or "none"
            raise ValueError(f"trial {trial_id!r} was never started; started: {known}")
        return trial_id

    def _new_start(self) -> int:
        """Now, and later than every start before: runs are listed in the order of their starts."""
        self._last_start = max(self._now(), self._last_start + 1)
        return self._last_start

    def _now(self) -> int:
        return round(1000 * self._clock())


def _step(record: Mapping[str, float | int | None]) -> int:
    step = record.get("step")
    if step is None:
        raise ValueError(f"record {dict(record)} has no step")
    return int(step)
