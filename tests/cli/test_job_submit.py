"""`ray job submit` of an experiment to a cluster started by hand: the README's own command on a real head node."""

import json
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

from loragrid.trials.tags import METHOD_TAG

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
    # Jobs are taken by the agent, which does not start where another Ray of this machine has its usual port.
    arguments += [f"--dashboard-agent-listen-port={free_port()}"]
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


Submit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def submit(
    head: dict[str, str], tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Submit:
    """Submits a small experiment with some methods: a command, the README's, with its file and folder exchanged."""
    file = tmp_path_factory.mktemp("experiment") / "submitted.yaml"

    def run(storage: Path, *methods: object, command: str = "") -> "subprocess.CompletedProcess[str]":
        experiment = {
            "name": "submitted",
            "model": {"name": str(tiny_gpt2_dir), "dtype": "float32"},
            "data": {"name": str(chat_jsonl), "max_length": 96, "num_train": 40, "num_eval": 10},
            "training": {"steps": 2, "batch_size": 4, "measure_steps": 0},
            "methods": list(methods),
        }
        file.write_text(yaml.safe_dump(experiment))
        command, replaced = re.subn(r"\S*experiments/\w+\.yaml", str(file), command or command_of_the_readme())
        assert replaced == 1
        assert "/shared/loragrid" in command
        command = command.replace("/shared/loragrid", str(storage))
        return subprocess.run(
            shlex.split(command), env=head, cwd=ROOT, capture_output=True, text=True, timeout=JOB_SECONDS, check=False
        )

    return run


def recorded(storage: Path) -> dict[str, str]:
    """Method -> status of its trial's run, and "" -> that of the sweep's."""
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("submitted")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    statuses = {run.data.tags.get(METHOD_TAG, ""): run.info.status for run in runs}
    assert len(statuses) == len(runs)
    return statuses


def statuses_of_jobs(environment: dict[str, str]) -> list[str]:
    """The status of every job that was submitted, oldest first, as the head tells it."""
    script = (
        "from ray.job_submission import JobSubmissionClient as Client\n"
        "jobs = sorted((job for job in Client().list_jobs() if job.submission_id), key=lambda job: job.start_time)\n"
        "print(*(job.status.value for job in jobs))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_submitted_experiment_succeeds_and_is_recorded(submit: Submit, head: dict[str, str], tmp_path: Path) -> None:
    done = submit(tmp_path / "store", "lora")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert statuses_of_jobs(head)[-1] == "SUCCEEDED"
    assert recorded(tmp_path / "store") == {"": "FINISHED", "lora": "FINISHED"}


def test_a_failed_trial_fails_the_job_but_no_other_trial(submit: Submit, head: dict[str, str], tmp_path: Path) -> None:
    done = submit(tmp_path / "store", "lora", {"name": "lora_fa", "lr": 1e30}, "vera")
    assert done.returncode != 0
    assert "diverged: loss or gradient not finite" in done.stdout, done.stdout + done.stderr
    assert statuses_of_jobs(head)[-1] == "FAILED"
    assert recorded(tmp_path / "store") == {"": "FAILED", "lora": "FINISHED", "lora_fa": "FAILED", "vera": "FINISHED"}


def test_the_kuberay_job_resumes_its_sweep_when_started_again(submit: Submit, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "kuberay.yaml").read_text(encoding="utf-8")
    (entrypoint,) = (found["spec"]["entrypoint"] for found in yaml.safe_load_all(text) if found["kind"] == "RayJob")
    # As in the Kubernetes job that KubeRay makes of it; its image has the project installed.
    installed = json.dumps({"env_vars": {"PYTHONPATH": f"{ROOT}/platform:{ROOT}/methods"}})
    command = shlex.join(["ray", "job", "submit", "--runtime-env-json", installed, "--", *shlex.split(entrypoint)])
    first, second = (submit(tmp_path / "store", "lora", command=command) for _ in range(2))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "has no sweep 'kubernetes-1' yet: this is its first" in first.stdout
    assert second.returncode == 0, second.stdout + second.stderr
    assert "kubernetes-1: 1 trial ended, 0 begun, 0 to be trained" in second.stdout
    assert recorded(tmp_path / "store") == {"": "FINISHED", "lora": "FINISHED"}


def test_a_submitted_experiment_that_is_impossible_fails_the_job(
    submit: Submit, head: dict[str, str], tmp_path: Path
) -> None:
    done = submit(tmp_path / "store", "lorra")
    assert done.returncode != 0
    assert statuses_of_jobs(head)[-1] == "FAILED"
    assert '"lorra": unknown method' in done.stdout
    assert not (tmp_path / "store").exists()
