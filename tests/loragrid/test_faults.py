"""Processes that are killed for real while a sweep runs: nothing that was recorded is lost, nothing comes twice."""

import io
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
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
        "methods": ["lora", "delta_lora", "vera", {"name": "lora_plus"}],
        "grid": {"method.rank": [2]},
        "pack": {"max_members": 2},
        "workers": {"cpus_per_worker": 2},
    }


def experiment(settings: dict[str, Any], store: Path, **changes: Any) -> lg.Experiment:
    methods = [
        {"name": method, "start_step": 4} if method == "delta_lora" else method for method in settings["methods"]
    ]
    return lg.Experiment(name="faults", **settings | {"methods": methods, "storage": {"path": str(store)}} | changes)


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
