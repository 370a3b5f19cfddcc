"""`docs/kuberay.yaml` runs an experiment file of this repository, as `cluster.yaml` does, and can be started again."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from loragrid.cli import app
from loragrid.config import load_experiment

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "kuberay.yaml").read_text(encoding="utf-8")


@pytest.fixture
def job() -> dict[str, Any]:
    claim, found = yaml.safe_load_all(TEXT)
    assert (claim["kind"], claim["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayJob")
    spec: dict[str, Any] = found["spec"]
    return spec


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_only_fields_that_the_operator_knows(job: dict[str, Any]) -> None:
    # KubeRay's API reference, ray.io/v1: RayJobSpec, RayClusterSpec, HeadGroupSpec, WorkerGroupSpec.
    assert job.keys() <= {
        "entrypoint",
        "submissionMode",
        "backoffLimit",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "rayClusterSpec",
    }
    cluster = job["rayClusterSpec"]
    assert cluster.keys() <= {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["headGroupSpec"].keys() == {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        fields = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group.keys() == fields


def test_the_command_is_one_of_the_command_lines_own_on_a_file_that_is_there(job: dict[str, Any]) -> None:
    python, flag, module, command, *arguments = shlex.split(job["entrypoint"])
    assert (python, flag, module, command) == ("python", "-m", "loragrid", "run")
    run = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    parameters = run.make_context("run", list(arguments)).params
    assert parameters["resume"], "a job that is started again goes on"
    assert parameters["name"]
    file = ROOT / Path(parameters["file"]).relative_to("/home/ray/loragrid")
    experiment = load_experiment(file, parameters["set_"])
    assert experiment.storage.path.startswith("/shared/")
    assert experiment.workers.use_gpu is True


def test_the_head_trains_nothing_and_gpu_workers_scale_from_zero(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == 0 < group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_every_pod_has_the_storage_and_the_same_image_with_the_pinned_ray(job: dict[str, Any]) -> None:
    version = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version is not None
    assert job["rayClusterSpec"]["rayVersion"] == version[1]
    assert f"FROM rayproject/ray:{version[1]}-py311-gpu" in TEXT
    assert "pip install -c constraints.txt -e ." in TEXT
    images = set()
    for pod in pods(job):
        (container,) = pod["containers"]
        images.add(container["image"])
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "shared")
        assert volume["persistentVolumeClaim"] == {"claimName": "loragrid-storage"}
    assert len(images) == 1


def test_a_job_whose_head_is_lost_is_started_again(job: dict[str, Any]) -> None:
    assert job["backoffLimit"] >= 1
    assert job["shutdownAfterJobFinishes"]
