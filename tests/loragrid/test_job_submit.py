"""`ray job submit` of an experiment to a cluster started by hand: the README's very command, against a real head."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from ray._common.utils import get_ray_address_file

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, JOB_SECONDS = 120, 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_of_the_readme() -> str:
    """The `ray job submit` of the README, its line breaks joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"^ray job submit .*$", text, re.MULTILINE)
    return " ".join(command.split())


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for commands against a running `ray start --head`, as the README sets it."""
    dashboard, log = free_port(), tmp_path_factory.mktemp("head") / "log"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
    environment |= {"PATH": path, "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
    port = free_port()
    arguments = [f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2", "--num-gpus=0"]
    # --block keeps the head's processes below this one, which ends them when it is told to end.
    with log.open("w") as output:
        process = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--disable-usage-stats", *arguments],
            env=environment,
            stdout=output,
            stderr=output,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        _wait_for_port(dashboard, process, log)
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        # What `ray stop` would do, which ends every Ray on the machine.
        noted = Path(get_ray_address_file(None))
        if noted.exists() and noted.read_text().strip().endswith(f":{port}"):
            noted.unlink()


def _wait_for_port(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"the head did not come up:\n{log.read_text()}")


@pytest.fixture(scope="module")
def submit(
    head: dict[str, str], tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path], "subprocess.CompletedProcess[str]"]:
    """Submits a small experiment with one method; the README's command with its file and its folder exchanged."""
    folder = tmp_path_factory.mktemp("experiment")

    def run(method: str, storage: Path) -> "subprocess.CompletedProcess[str]":
        file = folder / f"{method}.yaml"
        experiment = {
            "name": "submitted",
            "model": {"name": str(tiny_gpt2_dir), "dtype": "float32"},
            "data": {"name": str(chat_jsonl), "max_length": 96, "num_train": 40, "num_eval": 10},
            "training": {"steps": 2, "batch_size": 4, "measure_steps": 0},
            "methods": [method],
        }
        file.write_text(yaml.safe_dump(experiment))
        command = command_of_the_readme()
        assert "experiments/quickstart.yaml" in command
        assert "/shared/loragrid" in command
        command = command.replace("experiments/quickstart.yaml", str(file)).replace("/shared/loragrid", str(storage))
        return subprocess.run(
            shlex.split(command), env=head, cwd=ROOT, capture_output=True, text=True, timeout=JOB_SECONDS, check=False
        )

    return run


def test_a_submitted_experiment_succeeds_and_is_recorded(
    submit: Callable[[str, Path], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    done = submit("lora", tmp_path / "store")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    client = MlflowClient(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("submitted")
    assert experiment is not None
    statuses = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert len(statuses) == 2
    assert set(statuses.values()) == {"FINISHED"}


def test_a_submitted_experiment_that_is_impossible_fails_the_job(
    submit: Callable[[str, Path], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    done = submit("lorra", tmp_path / "store")
    assert done.returncode != 0
    assert "failed" in done.stdout
    assert '"lorra": unknown method' in done.stdout
    assert not (tmp_path / "store").exists()
