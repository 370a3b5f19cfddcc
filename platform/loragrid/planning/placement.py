"""Computes the size of a worker, and how many packs a cluster can hold at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loragrid.config.experiment import WorkersConfig


@dataclass(frozen=True, kw_only=True)
class Node:
    """The resources of one machine of the cluster, in use or not."""

    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The workers of one pack, and how many packs fit side by side (0: none on the cluster as it is now).

    shard: each worker holds its share of the base, not the whole.
    """

    num_workers: int
    cpus_per_worker: float
    use_gpu: bool
    num_packs: int
    shard: bool = False

    @property
    def threads(self) -> int:
        """Torch threads per worker; more threads than CPUs would slow down all workers of the machine."""
        return max(1, math.floor(self.cpus_per_worker))


def place(workers: WorkersConfig, nodes: Sequence[Node]) -> Placement:
    """Fit the workers to the cluster.

    A GPU worker takes one GPU and its share of the machine's CPUs; CPU workers of one pack share a machine's CPUs.
    """
    use_gpu = any(node.num_gpus for node in nodes) if workers.use_gpu == "auto" else workers.use_gpu
    cpus = workers.cpus_per_worker or _cpus_per_worker(workers.num_workers, use_gpu, nodes)
    places = sum(_places(node, cpus, use_gpu) for node in nodes)
    return Placement(
        num_workers=workers.num_workers,
        cpus_per_worker=cpus,
        use_gpu=use_gpu,
        num_packs=places // workers.num_workers,
        shard=workers.strategy == "shard",
    )


def _cpus_per_worker(num_workers: int, use_gpu: bool, nodes: Sequence[Node]) -> float:
    if use_gpu:
        shares = [node.num_cpus // node.num_gpus for node in nodes if node.num_gpus]
        return max(1.0, min(shares, default=1.0))
    if not nodes:
        return 1.0
    # The most workers on one machine if the pack is spread evenly over all machines.
    per_node = math.ceil(num_workers / len(nodes))
    return max(1.0, min(node.num_cpus for node in nodes) // per_node)


def _places(node: Node, cpus: float, use_gpu: bool) -> int:
    by_cpu = math.floor(node.num_cpus / cpus)
    return min(by_cpu, math.floor(node.num_gpus)) if use_gpu else by_cpu
