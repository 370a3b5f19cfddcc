"""Workers fit the cluster, and no more packs start than the cluster can hold."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from loragrid.config.experiment import Experiment, WorkersConfig
from loragrid.planning.placement import Node, Placement, place
from loragrid.planning.plan import plan
from loragrid.sweep.cluster import warn_of_slow_arithmetic


def cluster(*machines: tuple[float, float]) -> list[Node]:
    """Machines as (CPUs, GPUs)."""
    return [Node(num_cpus=num_cpus, num_gpus=num_gpus) for num_cpus, num_gpus in machines]


def placed(num_workers: int = 1, cpus: float = 1.0, packs: int = 0, *, gpu: bool = False) -> Placement:
    return Placement(num_workers=num_workers, cpus_per_worker=cpus, use_gpu=gpu, num_packs=packs)


@pytest.mark.parametrize(
    ("num_workers", "machines", "expected"),
    [
        (1, [(8, 0)], placed(1, 8, 1)),
        (1, [(16, 0), (16, 0)], placed(1, 16, 2)),
        (2, [(8, 0)], placed(2, 4, 1)),
        (2, [(8, 0), (8, 0)], placed(2, 8, 1)),
        (3, [(8, 0), (8, 0)], placed(3, 4, 1)),
        (3, [(8, 0)], placed(3, 2, 1)),
        (1, [(8, 0), (16, 0)], placed(1, 8, 3)),
        (4, [(2, 0)], placed(4, 1, 0)),
        (1, [(2, 0)], placed(1, 2, 1)),
    ],
)
def test_cpu_workers_share_the_machines_cpus(
    num_workers: int, machines: list[tuple[float, float]], expected: Placement
) -> None:
    assert place(WorkersConfig(num_workers=num_workers), cluster(*machines)) == expected


@pytest.mark.parametrize(
    ("num_workers", "machines", "expected"),
    [
        (1, [(16, 1)], placed(1, 16, 1, gpu=True)),
        (1, [(32, 4)], placed(1, 8, 4, gpu=True)),
        (2, [(32, 4)], placed(2, 8, 2, gpu=True)),
        (4, [(32, 2), (32, 2)], placed(4, 16, 1, gpu=True)),
        (3, [(32, 4)], placed(3, 8, 1, gpu=True)),
        (8, [(32, 4)], placed(8, 8, 0, gpu=True)),
        (1, [(32, 4), (8, 2)], placed(1, 4, 6, gpu=True)),
        (1, [(32, 4), (64, 0)], placed(1, 8, 4, gpu=True)),
    ],
)
def test_a_gpu_worker_takes_one_gpu_and_its_cpu_share(
    num_workers: int, machines: list[tuple[float, float]], expected: Placement
) -> None:
    assert place(WorkersConfig(num_workers=num_workers), cluster(*machines)) == expected


def test_gpus_are_left_alone_when_that_is_asked_for() -> None:
    workers = WorkersConfig(num_workers=2, use_gpu=False)
    assert place(workers, cluster((32, 4))) == placed(2, 16, 1)


def test_a_requested_gpu_that_is_missing_leaves_no_room() -> None:
    assert place(WorkersConfig(use_gpu=True), cluster((32, 0))) == placed(1, 1, 0, gpu=True)


@pytest.mark.parametrize(
    ("cpus", "machines", "packs"),
    [(2, [(8, 0)], 4), (3, [(8, 0)], 2), (0.5, [(2, 0)], 4), (16, [(8, 0), (8, 0)], 0), (4, [(8, 4)], 2)],
)
def test_the_cpus_a_user_sets_are_taken_as_they_are(
    cpus: float, machines: list[tuple[float, float]], packs: int
) -> None:
    placement = place(WorkersConfig(cpus_per_worker=cpus), cluster(*machines))
    assert (placement.cpus_per_worker, placement.num_packs) == (cpus, packs)


@pytest.mark.parametrize("use_gpu", ["auto", True, False])
def test_a_cluster_without_machines_holds_nothing_yet(use_gpu: bool) -> None:
    placement = place(WorkersConfig(num_workers=2, use_gpu=use_gpu), [])
    assert (placement.num_packs, placement.cpus_per_worker) == (0, 1.0)


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (2.9, 2), (16, 16)])
def test_a_worker_has_one_thread_per_whole_cpu(cpus: float, threads: int) -> None:
    assert placed(cpus=cpus).threads == threads


@pytest.mark.parametrize(
    ("dtype", "capability", "gpu", "warned"),
    [
        ("bfloat16", "AVX2", False, True),
        ("bfloat16", "DEFAULT", False, True),
        ("bfloat16", "AVX512", False, False),
        ("bfloat16", "AVX2", True, False),
        ("float32", "AVX2", False, False),
    ],
)
def test_a_processor_without_bfloat16_is_named_before_training(
    monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path, dtype: str, capability: str, gpu: bool, warned: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    the_plan = plan(
        Experiment(
            name="types",
            model={"name": str(tiny_llama_dir), "dtype": dtype},
            data={"name": "chitchat"},
            training={"steps": 3},
            methods=["lora"],
        )
    )
    console = Console(record=True, width=200)
    warn_of_slow_arithmetic(the_plan, placed(gpu=gpu), console)
    text = console.export_text()
    assert ("--set model.dtype=float32" in text) is warned
    assert (capability in text) is warned


def test_only_a_base_that_is_to_be_sharded_is() -> None:
    machines = cluster((4, 0))
    assert place(WorkersConfig(num_workers=2, strategy="shard"), machines).shard
    assert not place(WorkersConfig(num_workers=2), machines).shard
