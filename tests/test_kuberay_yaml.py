"""`docs/kuberay.yaml` runs an experiment file of this repository, as `cluster.yaml` does, and can be restarted."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from loragrid.cli.main import app
from loragrid.trials.load import load_experiment

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "kuberay.yaml").read_text(encoding="utf-8")

# KubeRay's API reference (ray.io/v1), and Kubernetes' for what is in a pod, as far as a job has use for them. The
# operator does not see a field of another name.
FIELDS: dict[str, set[str]] = {
    "job": {
        "backoffLimit", "entrypoint", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes",
        "submissionMode", "submitterConfig", "submitterPodTemplate", "ttlSecondsAfterFinished",
    },
    "rayClusterSpec": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "rayVersion",
        "workerGroupSpecs",
    },
    "authOptions": {"mode", "secretName"},
    "headGroupSpec": {"headService", "rayStartParams", "serviceType", "template"},
    "workerGroupSpecs": {
        "groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas",
        "template",
    },
    "template": {"metadata", "spec"},
    "spec": {"containers", "nodeSelector", "securityContext", "serviceAccountName", "tolerations", "volumes"},
    "containers": {"args", "command", "env", "image", "name", "ports", "resources", "volumeMounts"},
    "resources": {"limits", "requests"},
    "tolerations": {"effect", "key", "operator", "value"},
    "env": {"name", "value", "valueFrom"},
    "volumes": {"configMap", "emptyDir", "name", "persistentVolumeClaim"},
    "volumeMounts": {"mountPath", "name", "readOnly", "subPath"},
}  # fmt: skip


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


def unknown_fields(value: Any, kind: str) -> Iterator[str]:
    """Keys that `FIELDS` lacks, below the keys whose fields it lists."""
    for item in value if isinstance(value, list) else [value]:
        yield from (f"{kind}.{key}" for key in item if key not in FIELDS[kind])
        for key, below in item.items():
            if key in FIELDS:
                yield from unknown_fields(below, key)


def misspell_the_limit(job: dict[str, Any]) -> None:
    job["backOffLimit"] = job.pop("backoffLimit")


def misspell_the_workers(job: dict[str, Any]) -> None:
    job["rayClusterSpec"]["workerGroups"] = job["rayClusterSpec"].pop("workerGroupSpecs")


def misspell_a_mount(job: dict[str, Any]) -> None:
    pods(job)[2]["containers"][0]["volumeMounts"][0]["path"] = "/shared"


@pytest.mark.parametrize(
    ("break_it", "field"),
    [
        (misspell_the_limit, "job.backOffLimit"),
        (misspell_the_workers, "rayClusterSpec.workerGroups"),
        (misspell_a_mount, "volumeMounts.path"),
    ],
)
def test_a_field_that_nobody_reads_is_found(
    job: dict[str, Any], break_it: Callable[[dict[str, Any]], None], field: str
) -> None:
    break_it(job)
    assert field in list(unknown_fields(job, "job"))


def test_only_fields_that_the_operator_knows(job: dict[str, Any]) -> None:
    assert list(unknown_fields(job, "job")) == []


def test_the_job_runs_an_existing_command_on_an_existing_file(job: dict[str, Any]) -> None:
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


def test_head_trains_nothing_and_both_worker_groups_scale_from_zero(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group, num_gpus in zip(cluster["workerGroupSpecs"], (None, "1"), strict=True):
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == num_gpus


def test_every_pod_requires_the_token_and_may_write_to_storage(job: dict[str, Any]) -> None:
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pods(job):
        assert pod["securityContext"] == {"fsGroup": 100}


def test_all_pods_share_storage_and_one_image_with_pinned_ray(job: dict[str, Any]) -> None:
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
