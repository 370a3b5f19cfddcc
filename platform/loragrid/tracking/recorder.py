"""Records a sweep: one parent run and one child run per trial, delivered to MLflow through a spool on disk."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loragrid.tracking.mlflow_experiment import MlflowExperiment
from loragrid.tracking.mlflow_internals import LOGGED_ARTIFACTS_TAG
from loragrid.tracking.mlflow_writer import SWEEP_ITSELF
from loragrid.tracking.outbox import Outbox, Point
from loragrid.tracking.pages import trials_page
from loragrid.tracking.store_uri import RunStatus, Scalar
from loragrid.tracking.sweep_names import SweepNames
from loragrid.trials.metrics import sweep_note
from loragrid.trials.tags import (
    ANSWER_TAG,
    KIND_TAG,
    METHOD_TAG,
    NOTE_TAG,
    QUESTION_TAG,
    REASON_TAG,
    SWEEP_TAG,
    TRIAL_TAG,
)

PATIENCE_SECONDS = 20.0
"""How long the end of a sweep waits for a store that fails."""

Record = Mapping[str, float | int | None]
"""`{"step": 3, "train/loss": 2.5, ...}`, with the optional key `timestamp` in seconds since 1970."""


class Recorder:
    """The only writer of a sweep's record: call start_sweep, then start, log and end every trial, then end_sweep.

    No method waits for MLflow: a method returns as soon as its operation is on disk, under `spool_folder` (None: in a
    temporary folder). A thread delivers the operations every two seconds, in order for each run.

    artifact_root: see `artifact_location`. clock: returns seconds since 1970. notify: see `Delivery`.
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
        self.spool_folder = spool_folder
        self.is_delivered = True
        """False after a sweep if MLflow lacks a part of its record; that part is in the spool."""
        self.sweep_name = ""
        """The name of the sweep that is being recorded or was recorded last; "" before the first."""
        self._experiment = MlflowExperiment(experiment_name, tracking_uri, artifact_root)
        self.experiment_id = self._experiment.experiment_id
        self._names = SweepNames(self._experiment, spool_folder)
        self._clock, self._notify = _RunClock(clock), notify
        self._trials = _TrialRegister()
        self._open_outbox: Outbox | None = None

    @property
    def run_ids(self) -> dict[str, str]:
        """Trial id -> MLflow's run id, for the trials that MLflow has."""
        self.deliver()
        return {key: run_id for key, run_id in self._writer.run_ids.items() if key != SWEEP_ITSELF}

    @property
    def sweep_run_id(self) -> str:
        """MLflow's run id of the sweep.

        Raises:
            ValueError: no sweep was started, or MLflow does not have it yet.
        """
        if not self.sweep_name:
            raise ValueError("no sweep is open: call start_sweep first")
        self.deliver()
        run_id = self._writer.find_run(SWEEP_ITSELF)
        if run_id is None:
            raise ValueError(f"MLflow does not have sweep {self.sweep_name!r} yet")
        return run_id

    def deliver(self, patience_seconds: float = PATIENCE_SECONDS) -> bool:
        """Wait until MLflow has everything; False if it did not answer within `patience_seconds`."""
        return self._open_outbox is None or self._open_outbox.wait(patience_seconds)

    def next_sweep_name(self) -> str:
        """The experiment's name with the next free number: the first sweep is `<experiment>-1`."""
        return self._names.next_free()

    def start_sweep(self, name: str, parameters: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the parent run. The tag `QUESTION_TAG` holds the experiment's question.

        Raises:
            ValueError: the experiment has a sweep of that name, another is open, or another program records this one.
        """
        if self._open_outbox is None:
            self._names.check_free(name)
        self._open(name)
        note = self._note(name, tags.get(QUESTION_TAG, ""))
        all_tags = {NOTE_TAG: note, **tags, KIND_TAG: "sweep", SWEEP_TAG: name}
        self._outbox.start_run(SWEEP_ITSELF, name, self._clock.next_start(), parameters, all_tags)

    def resume_sweep(self, name: str, tags: Mapping[str, str]) -> None:
        """Continue the record of a sweep that has ended, or whose program died."""
        self._open(name)
        self._outbox.reopen_run(SWEEP_ITSELF)
        if tags:
            self._outbox.set_tags(SWEEP_ITSELF, tags)

    def start_trial(
        self, trial_id: str, parameters: Mapping[str, Scalar], tags: Mapping[str, str], *, name: str = ""
    ) -> None:
        """Open the trial's child run. name: the run's name on MLflow's pages; "": the trial id."""
        outbox = self._outbox
        self._trials.add(trial_id)
        own = {
            KIND_TAG: "trial",
            SWEEP_TAG: self.sweep_name,
            TRIAL_TAG: trial_id,
            METHOD_TAG: str(parameters.get("method.name", "")),
        }
        outbox.start_run(trial_id, name or trial_id, self._clock.next_start(), parameters, {**tags, **own})

    def resume_trial(self, trial_id: str, tags: Mapping[str, str]) -> None:
        """Continue the run of a trial that did not finish."""
        outbox = self._outbox
        self._trials.add(trial_id)
        outbox.reopen_run(trial_id)
        outbox.set_tags(trial_id, tags)

    def log_records(self, trial_id: str, records: Sequence[Record]) -> None:
        """Add points to the trial's curves.

        None, NaN and infinity are left out: a value that was not measured is missing, and SQL would store infinity as
        1.8e308.
        """
        self._trials.check_started(trial_id)
        self._outbox.log_points(trial_id, _points(records, self._clock.seconds()))

    def log_summary(self, trial_id: str, metrics: Mapping[str, float | None]) -> None:
        """Log metrics with one value per trial; None, NaN and infinity are left out."""
        self.log_records(trial_id, [{**metrics, "step": 0}])

    def tag_trial(self, trial_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a trial's run."""
        self._trials.check_started(trial_id)
        self._outbox.set_tags(trial_id, tags)

    def log_artifacts(self, trial_id: str, folder: Path, artifact_path: str) -> None:
        """Keep the files of a folder with the trial's run."""
        self._trials.check_started(trial_id)
        self._outbox.log_files(trial_id, folder, artifact_path)

    def log_sweep_summary(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Log metrics and tags of the sweep's own run; values that are not finite are left out."""
        self._outbox.log_points(SWEEP_ITSELF, _points([{**metrics, "step": 0}], self._clock.seconds()))
        if tags:
            self._outbox.set_tags(SWEEP_ITSELF, tags)

    def log_answer(self, name: str, question: str, answer: str) -> None:
        """Put the verdict's answer on top of the description of the sweep `name`, and into a tag of its own."""
        self._outbox.set_tags(SWEEP_ITSELF, {NOTE_TAG: self._note(name, question, answer), ANSWER_TAG: answer})

    def _note(self, name: str, question: str, answer: str = "") -> str:
        return sweep_note(
            question,
            self.experiment_name,
            trials=trials_page(".", self.experiment_id, name),
            charts=trials_page(".", self.experiment_id, name, charts=True),
            answer=answer,
        )

    def log_sweep_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Keep a file with the sweep's run."""
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / path.name).write_bytes(path.read_bytes())
            self._outbox.log_files(SWEEP_ITSELF, Path(name), artifact_path or "")

    def log_sweep_table(self, file_name: str, columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> None:
        """Keep a table with the sweep's run, as `MlflowClient.log_table` would; a later one replaces it.

        file_name: ends in .json. MLflow's own function waits for the store, and appends to a table of that name.
        """
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / file_name
            path.write_text(json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}), "utf-8")
            self._outbox.log_files(SWEEP_ITSELF, Path(name), "")
        tables = json.dumps([{"path": file_name, "type": "table"}])
        self._outbox.set_tags(SWEEP_ITSELF, {LOGGED_ARTIFACTS_TAG: tables})

    def end_trial(self, trial_id: str, status: RunStatus, reason: str = "") -> None:
        """Close the trial's run. reason: why it did not finish, shown on the run's page."""
        self._trials.end(trial_id)
        if reason:
            self._outbox.set_tags(trial_id, {REASON_TAG: reason, NOTE_TAG: f"**{status.lower()}**: {reason}"})
        self._outbox.end_run(trial_id, status, self._clock.now())

    def end_sweep(self, status: RunStatus) -> None:
        """End open trials as KILLED, close the parent run, and wait until MLflow has everything."""
        for trial_id in self._trials.open_trials():
            self.end_trial(trial_id, "KILLED", "the sweep ended before this trial")
        self._outbox.end_run(SWEEP_ITSELF, status, self._clock.now())
        self.is_delivered = self._outbox.close(PATIENCE_SECONDS)
        self._open_outbox = None

    @property
    def _outbox(self) -> Outbox:
        if self._open_outbox is None:
            raise ValueError("no sweep is open: call start_sweep first")
        return self._open_outbox

    def _open(self, name: str) -> None:
        if self._open_outbox is not None:
            raise ValueError(f"sweep {self.sweep_name!r} is still open: call end_sweep before starting {name!r}")
        folder = self.spool_folder / name if self.spool_folder else None
        self._open_outbox = Outbox(folder, self._experiment, name, self._notify)
        self._writer = self._open_outbox.writer
        self.sweep_name = name
        self._trials = _TrialRegister()


class _RunClock:
    """The times of runs in milliseconds since 1970. seconds: returns seconds since 1970."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self.seconds = seconds
        self._last_start = 0

    def now(self) -> int:
        return round(1000 * self.seconds())

    def next_start(self) -> int:
        """The present time, moved behind every earlier start, because runs are listed by their start times."""
        self._last_start = max(self.now(), self._last_start + 1)
        return self._last_start


class _TrialRegister:
    """Which trials of the open sweep were started, and which of them have not ended."""

    def __init__(self) -> None:
        self._started: set[str] = set()
        self._open: dict[str, None] = {}  # an ordered set

    def add(self, trial_id: str) -> None:
        if trial_id in self._started:
            raise ValueError(f"trial {trial_id!r} was already started")
        self._started.add(trial_id)
        self._open[trial_id] = None

    def check_started(self, trial_id: str) -> None:
        if trial_id not in self._started:
            known = ", ".join(sorted(self._started)) or "none"
            raise ValueError(f"trial {trial_id!r} was never started; started: {known}")

    def end(self, trial_id: str) -> None:
        self.check_started(trial_id)
        if trial_id not in self._open:
            raise ValueError(f"trial {trial_id!r} has already ended")
        del self._open[trial_id]

    def open_trials(self) -> tuple[str, ...]:
        return tuple(self._open)


def _points(records: Sequence[Record], now: float) -> list[Point]:
    """The finite values of the records. now: the time of records without one, in seconds since 1970."""
    return [
        (key, float(value), round(1000 * (record.get("timestamp") or now)), _step(record))
        for record in records
        for key, value in record.items()
        if key not in ("step", "timestamp") and value is not None and math.isfinite(value)
    ]


def _step(record: Record) -> int:
    step = record.get("step")
    if step is None:
        raise ValueError(f"record {dict(record)} has no step")
    return int(step)
