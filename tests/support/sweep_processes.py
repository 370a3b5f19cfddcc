"""Shared by the fault tests: sweeps in separate processes, and what they recorded in MLflow."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

import loragrid as lg
from loragrid.trials.tags import PARENT_TAG, SWEEP_TAG, TRIAL_TAG

NAME = "faults"
STEPS = 40
CHECKPOINT_EVERY = 4
CURVES = ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")

Points = list[tuple[int, float]]
"""(Step, value) of one curve, in the order in which MLflow returns them."""


def settings_of(model_folder: Path, rows_file: Path) -> dict[str, Any]:
    """An experiment's keys without name and storage: two packs, whose states are saved every four steps."""
    return {
        "model": {"name": str(model_folder), "dtype": "float32"},
        "data": {"name": str(rows_file), "max_length": 96, "num_train": 40, "num_eval": 10},
        "training": {
            # Many steps: a pack must still be training when the test has found its line and its process.
            "steps": STEPS,
            "batch_size": 4,
            "lr": 1e-2,
            "eval_every": 10,
            "report_every": 1,
            "checkpoint_every": CHECKPOINT_EVERY,
            "measure_steps": 0,
        },
        "methods": ["lora", {"name": "delta_lora", "start_step": 4}, "vera", "lora_plus"],
        "grid": {"method.rank": [2]},
        "pack": {"max_members": 2},
        "workers": {"cpus_per_worker": 2},
    }


def experiment(settings: dict[str, Any], store: Path | str, **changes: Any) -> lg.Experiment:
    """The experiment, with its storage in `store`."""
    return lg.Experiment(name=NAME, **settings | {"storage": {"path": str(store)}} | changes)


def write(settings: dict[str, Any], store: Path, file: Path, **changes: Any) -> Path:
    """The experiment as a file."""
    file.write_text(yaml.safe_dump({"name": NAME, **settings, "storage": {"path": str(store)}, **changes}))
    return file


def sqlite_uri(store: Path) -> str:
    """Where a sweep with this storage is recorded."""
    return f"sqlite:///{store / 'mlflow.db'}"


def trial_runs(tracking_uri: str, sweep: str = f"{NAME}-1") -> dict[str, Run]:
    """Trial id -> its one run."""
    client = MlflowClient(tracking_uri=tracking_uri)
    found = client.get_experiment_by_name(NAME)
    assert found is not None
    runs = client.search_runs([found.experiment_id], f"tags.`{SWEEP_TAG}` = '{sweep}'")
    trials = [run for run in runs if PARENT_TAG in run.data.tags]
    by_trial = {run.data.tags[TRIAL_TAG]: run for run in trials}
    assert len(by_trial) == len(trials), "one run per trial"
    return by_trial


def statuses(store: Path) -> list[str]:
    """The statuses of all trials, sorted."""
    return sorted(run.info.status for run in trial_runs(sqlite_uri(store)).values())


def curves(tracking_uri: str, sweep: str = f"{NAME}-1") -> dict[tuple[str, str], Points]:
    """(Trial id, key) -> every point that MLflow holds, including duplicates."""
    client = MlflowClient(tracking_uri=tracking_uri)
    return {
        (trial_id, key): [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
        for trial_id, run in trial_runs(tracking_uri, sweep).items()
        for key in CURVES
    }


def adapters(store: Path) -> dict[str, bytes]:
    """Trial id -> the recorded adapter's tensors, as bytes."""
    folders = {
        trial_id: Path(run.info.artifact_uri.removeprefix("file://")) / "adapter"
        for trial_id, run in trial_runs(sqlite_uri(store)).items()
    }
    return {trial_id: (folder / "adapter_model.safetensors").read_bytes() for trial_id, folder in folders.items()}


def assert_undisturbed(store: Path, calm: Path) -> None:
    """Asserts that statuses, points and adapters equal those of the undisturbed sweep in `calm`, to the bit."""
    assert statuses(store) == statuses(calm)
    assert curves(sqlite_uri(store)) == curves(sqlite_uri(calm))
    assert adapters(store) == adapters(calm)


def start(file: Path, *options: str) -> subprocess.Popen[str]:
    """Starts `loragrid run` as a separate process that leads its own session."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "loragrid", "run", str(file), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process: subprocess.Popen[str], line: str) -> str:
    """The output up to the first line that contains `line`; fails if there is none."""
    assert process.stdout is not None
    seen = ""
    for printed in process.stdout:
        seen += printed
        if line in printed:
            return seen
    raise AssertionError(f"{line!r} was not printed:\n{seen}")


def wait_for_states(store: Path, trial_ids: Iterable[str], timeout_seconds: float = 120.0) -> None:
    """Wait until each of these trials has a saved state."""
    deadline = time.monotonic() + timeout_seconds
    folders = [store / "trials" / f"{NAME}-1" / trial_id for trial_id in trial_ids]
    while not all(list(folder.glob("*.step-*")) for folder in folders):
        assert time.monotonic() < deadline, f"no states in {folders}"
        time.sleep(0.05)


def finish(process: subprocess.Popen[str], timeout_seconds: float = 300.0) -> tuple[int, str]:
    """Waits for the process to end; returns (exit code, the rest of the output)."""
    output, _ = process.communicate(timeout=timeout_seconds)
    return process.returncode, output


def living_in_session_of(leader: int) -> list[psutil.Process]:
    """The living processes of the session that process `leader` led."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
