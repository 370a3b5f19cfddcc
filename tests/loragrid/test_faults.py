"""Processes that are killed for real while a sweep runs: nothing that was recorded is lost, nothing comes twice."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from ray import tune
from rich.console import Console

import loragrid as lg
from loragrid.tracking import PARENT_TAG, TRIAL_TAG

pytestmark = [pytest.mark.end_to_end]

STEPS = 12


@pytest.fixture(scope="module")
def settings(tiny_gpt2_dir: Path, chat_jsonl: Path) -> dict[str, Any]:
    """Two packs, one after the other in one lane, whose states are saved every two steps."""
    return {
        "model": {"name": str(tiny_gpt2_dir), "dtype": "float32"},
        "data": {"name": str(chat_jsonl), "max_length": 96, "num_train": 40, "num_eval": 10},
        "training": {
            "steps": STEPS,
            "batch_size": 4,
            "lr": 1e-2,
            "eval_every": 3,
            "report_every": 1,
            "checkpoint_every": 2,
            "measure_steps": 0,
        },
        "methods": ["lora", {"name": "delta_lora", "start_step": 4}, "vera", "lora_plus"],
        "grid": {"method.rank": [2]},
        "pack": {"max_members": 2},
        "workers": {"cpus_per_worker": 2},
    }


def experiment(settings: dict[str, Any], store: Path, **changes: Any) -> lg.Experiment:
    return lg.Experiment(name="faults", **settings | {"storage": {"path": str(store)}} | changes)


Curves = dict[tuple[str, str], list[tuple[int, float]]]


def recorded(store: Path, name: str = "faults") -> tuple[dict[str, str], Curves]:
    """(Trial id -> status, curves) of every trial run in the store, each exactly as MLflow holds it."""
    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    found = client.get_experiment_by_name(name)
    assert found is not None
    runs = [run for run in client.search_runs([found.experiment_id]) if PARENT_TAG in run.data.tags]
    statuses = {run.data.tags[TRIAL_TAG]: run.info.status for run in runs}
    assert len(statuses) == len(runs), "one run per trial"
    curves: Curves = {}
    for run in runs:
        for key in ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"):
            points = client.get_metric_history(run.info.run_id, key)
            curves[run.data.tags[TRIAL_TAG], key] = [(point.step, point.value) for point in points]
    return statuses, curves


def adapters(store: Path) -> dict[str, bytes]:
    """Trial id -> the recorded adapter's tensors, as bytes."""
    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    found = client.get_experiment_by_name("faults")
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    files = {
        run.data.tags[TRIAL_TAG]: Path(run.info.artifact_uri.removeprefix("file://")) / "adapter"
        for run in runs
        if PARENT_TAG in run.data.tags
    }
    return {trial_id: (folder / "adapter_model.safetensors").read_bytes() for trial_id, folder in files.items()}


@pytest.fixture(scope="module")
def calm(settings: dict[str, Any], ray_of_two_cpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a sweep that nothing happened to."""
    store = tmp_path_factory.mktemp("calm")
    assert lg.run(experiment(settings, store)).succeeded
    return store


def assert_undisturbed(store: Path, calm: Path) -> None:
    """Every run, point and adapter is the undisturbed sweep's, to the bit."""
    statuses, curves = recorded(store)
    expected_statuses, expected_curves = recorded(calm)
    assert statuses == expected_statuses
    assert curves == expected_curves
    assert adapters(store) == adapters(calm)


class Strikes(io.StringIO):
    """A terminal that strikes when a line with `text` is printed, once."""

    def __init__(self, text: str, process: str, number: int = signal.SIGKILL) -> None:
        super().__init__()
        self.text, self.process, self.number, self.struck = text, process, number, 0

    def write(self, text: str) -> int:
        if self.text in text and not self.struck:
            for process in psutil.Process().children(recursive=True):
                if self.process in " ".join([process.name(), *process.cmdline()]):
                    os.kill(process.pid, self.number)
                    self.struck += 1
        return super().write(text)


@pytest.mark.usefixtures("ray_of_two_cpus")
@pytest.mark.parametrize(
    ("process", "line"),
    [
        ("RayTrainWorker", "pack-001: training"),
        ("TrainController", "pack-000: training"),
        ("ImplicitFunc", "pack-001: tr"),
    ],
)
def test_whichever_process_of_a_lane_is_killed_the_curves_and_adapters_are_the_undisturbed_ones(
    settings: dict[str, Any], calm: Path, tmp_path: Path, process: str, line: str
) -> None:
    terminal = Strikes(line, process)
    result = lg.run(experiment(settings, tmp_path), console=Console(file=terminal, width=200))
    assert terminal.struck == 1, [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert result.succeeded
    assert_undisturbed(tmp_path, calm)
    assert not (tmp_path / "trials" / "faults-1").exists(), "nothing is kept of a sweep that is done"


@pytest.mark.usefixtures("ray_of_two_cpus")
def test_a_sweep_whose_tune_trial_can_never_start_is_failed_and_its_table_says_why(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoSuchProcess(tune.Trainable):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            raise RuntimeError("no process to be had")

    monkeypatch.setattr("loragrid.rounds.lightweight", lambda trainable: NoSuchProcess)
    monkeypatch.setattr("loragrid.rounds.MAX_LOST_DRIVERS", 1)
    result = lg.run(experiment(settings, tmp_path))
    assert not result.succeeded
    table = result.to_pandas()
    assert set(table["trial_id"]) == {trial.trial_id for trial in result.plan.trials}
    assert set(table["status"]) == {"FAILED"}
    assert set(table["reason"]) == {"RuntimeError: no process to be had"}
    client = MlflowClient(tracking_uri=result.tracking_uri)
    found = client.get_experiment_by_name("faults")
    assert found is not None
    (sweep,) = (run for run in client.search_runs([found.experiment_id]) if PARENT_TAG not in run.data.tags)
    assert sweep.info.status == "FAILED"


def start(file: Path, *options: str) -> subprocess.Popen[str]:
    """`loragrid run` as a process of its own, the leader of its own session."""
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
    """What the process prints up to a line, which must come."""
    assert process.stdout is not None
    seen = ""
    for printed in process.stdout:
        seen += printed
        if line in printed:
            return seen
    raise AssertionError(f"{line!r} was not printed:\n{seen}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(Exit code, the rest of what is printed)."""
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def write(settings: dict[str, Any], store: Path, file: Path, **changes: Any) -> Path:
    """The experiment as a file."""
    mapping = {"name": "faults", **settings, "storage": {"path": str(store)}, **changes}
    file.write_text(yaml.safe_dump(mapping))
    return file


def living_in_session_of(leader: int) -> list[psutil.Process]:
    """What lives in the session that a process has led."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_a_sweep_whose_driver_is_killed_goes_on_with_resume_and_nothing_is_lost_or_comes_twice(
    settings: dict[str, Any], calm: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    file = write(settings, store, tmp_path / "faults.yaml")
    process = start(file)
    read_until(process, "pack-001: training")
    time.sleep(1)  # some steps into the second pack
    process.kill()
    finish(process)
    statuses, _ = recorded(store)
    assert "RUNNING" in statuses.values()
    code, output = finish(start(file, "--resume"))
    assert code == 0, output
    assert "2 are to be trained" in output
    assert_undisturbed(store, calm)
    code, output = finish(start(file, "--resume"))
    assert code == 0, output
    assert "0 are to be trained" in output
    assert_undisturbed(store, calm)


def test_ctrl_c_ends_everything_with_130_and_a_hint_and_an_extended_grid_trains_only_what_is_new_and_left(
    settings: dict[str, Any], calm: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    file = write(settings, store, tmp_path / "faults.yaml")
    process = start(file)
    read_until(process, "pack-001: training")
    os.kill(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert f"loragrid run {file} --name faults-1 --resume" in output
    assert "Traceback" not in output
    for _ in range(100):
        if not living_in_session_of(process.pid):
            break
        time.sleep(0.1)
    assert not living_in_session_of(process.pid)
    before = ended_at(store)
    assert sorted(status for status, _ in before.values()) == ["FINISHED", "FINISHED", "KILLED", "KILLED"]
    write(settings, store, file, methods=[*settings["methods"], {"name": "lora", "rank": 4}])
    code, output = finish(start(file, "--resume"))
    assert code == 0, output
    after = ended_at(store)
    assert len(after) == 5
    assert {status for status, _ in after.values()} == {"FINISHED"}
    for trial_id, (status, end) in before.items():
        assert (after[trial_id][1] == end) == (status == "FINISHED")
    _, curves = recorded(store)
    _, expected = recorded(calm)
    assert {key: points for key, points in curves.items() if key in expected} == expected


def ended_at(store: Path) -> dict[str, tuple[str, int]]:
    """Trial id -> (status, time of its end)."""
    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    found = client.get_experiment_by_name("faults")
    assert found is not None
    runs = [run for run in client.search_runs([found.experiment_id]) if PARENT_TAG in run.data.tags]
    return {run.data.tags[TRIAL_TAG]: (run.info.status, run.info.end_time) for run in runs}
