"""Connects to a Ray cluster, or starts one if none is named, and checks that it can hold a pack's workers."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch
from rich.console import Console

from loragrid.config.experiment import Experiment
from loragrid.formatting import count_of
from loragrid.planning.placement import Node, Placement
from loragrid.planning.plan import Plan
from loragrid.sweep.ray_start import goal_of, start_ray


@contextmanager
def connected_to_ray(address: str | None) -> Iterator[bool]:
    """Connect this process to Ray inside the `with` block; yield whether the cluster was started only for it.

    Raises:
        ValueError: the address is empty.
        RayStartError: Ray cannot be started, or no cluster answers at the address.
    """
    if ray.is_initialized():
        yield False
        return
    goal = goal_of(address)
    start_ray(goal)
    try:
        yield goal.is_local
    finally:
        ray.shutdown()


def cluster_nodes() -> list[Node]:
    """The machines of the connected cluster that are alive and have CPUs."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [Node(num_cpus=found.get("CPU", 0.0), num_gpus=found.get("GPU", 0.0)) for found in resources]
    return [node for node in nodes if node.num_cpus]


def check_placement(experiment: Experiment, placement: Placement, is_local: bool, console: Console) -> None:
    """Check that one pack's workers fit: raise if they do not fit on this machine, print if the cluster must grow.

    Raises:
        ValueError: one pack's workers do not fit on this machine.
    """
    if placement.num_packs:
        return
    kind = "GPU" if placement.use_gpu else "CPU"
    need = f"{count_of(placement.num_workers, 'worker')} with {placement.cpus_per_worker:g} CPUs" + (
        " and a GPU each" if placement.use_gpu else " each"
    )
    if is_local:
        raise ValueError(
            f"workers: a pack's workers do not fit on this machine: it needs {need}; "
            f"allowed: as many as there are {kind}s, or a cluster (--address)"
        )
    console.print(f"waiting for the cluster to grow: a pack needs {need}", style="yellow")


def warn_of_slow_arithmetic(the_plan: Plan, placement: Placement, console: Console) -> None:
    """Warn of bfloat16 on a processor that lacks it: steps are many times slower (backward on AVX2: 47 times)."""
    on_cpu = not placement.use_gpu and any(trial.model.dtype == "bfloat16" for trial in the_plan.trials)
    capability = torch.backends.cpu.get_cpu_capability()
    if on_cpu and not capability.startswith(("AVX512", "SVE")):
        console.print(
            f"model.dtype: this processor ({capability}) has no bfloat16 arithmetic, steps will be many times slower "
            "than in float32; to use that: --set model.dtype=float32",
            style="yellow",
            highlight=False,
        )
