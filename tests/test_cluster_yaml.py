"""Ray's launcher accepts `cluster.yaml`, which installs the versions that the repository pins."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return loaded


def test_rays_launcher_takes_the_file(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def misspell_a_key(cluster: dict[str, Any]) -> None:
    cluster["max_worker"] = cluster.pop("max_workers")


def break_a_type(cluster: dict[str, Any]) -> None:
    cluster["idle_timeout_minutes"] = "ten"


def misspell_a_key_of_a_node(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu_worker"]["min_worker"] = 0


def lose_the_head(cluster: dict[str, Any]) -> None:
    cluster["head_node_type"] = "gpu_head"


def ask_for_more_than_the_maximum(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu_worker"]["min_workers"] = cluster["max_workers"] + 1


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (misspell_a_key, "'max_worker' was unexpected"),
        (break_a_type, "'ten' is not of type"),
        (misspell_a_key_of_a_node, "'min_worker' was unexpected"),
        (lose_the_head, "`head_node_type` must be one of"),
        (ask_for_more_than_the_maximum, "smaller than the sum of `min_workers`"),
    ],
)
def test_rays_launcher_refuses_the_file_once_it_is_broken(
    cluster: dict[str, Any], break_it: Callable[[dict[str, Any]], None], reason: str
) -> None:
    break_it(cluster)
    with pytest.raises(Exception, match=re.escape(reason)):
        validate_config(prepare_config(cluster))


def test_the_head_trains_nothing_and_gpu_workers_scale_from_zero(cluster: dict[str, Any]) -> None:
    node_types = cluster["available_node_types"]
    head, workers = node_types[cluster["head_node_type"]], node_types["gpu_worker"]
    assert set(node_types) == {cluster["head_node_type"], "gpu_worker"}
    assert re.match(r"[cmr]\d", head["node_config"]["InstanceType"])
    assert re.match(r"[gp]\d", workers["node_config"]["InstanceType"])
    assert workers["min_workers"] == 0
    assert workers["max_workers"] == cluster["max_workers"] > 0


def test_every_node_reaches_the_same_storage(cluster: dict[str, Any]) -> None:
    mounts = [command for command in cluster["initialization_commands"] if "mount -t nfs4" in command]
    assert len(mounts) == 1
    assert mounts[0].endswith(" /shared")
    assert f"efs.{cluster['provider']['region']}.amazonaws.com" in mounts[0]
    assert "--volume /shared:/shared" in cluster["docker"]["run_options"]


def test_every_node_installs_this_project_with_the_pinned_versions(cluster: dict[str, Any]) -> None:
    folder = next(remote for remote, local in cluster["file_mounts"].items() if local == ".")
    assert f"cd {folder} && pip install -c constraints.txt -e ." in cluster["setup_commands"]
    ray_version = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ray_version is not None
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{ray_version[1]}-py311-")


def test_head_and_workers_require_the_token_of_whoever_starts_them(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
        assert "ray start" in commands[-1]
