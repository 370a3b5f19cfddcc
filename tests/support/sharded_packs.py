"""The body of a worker process that trains packs on a whole base, then on the same base sharded."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from loragrid.models.activation_checkpointing import checkpoint_activations
from loragrid.models.sharding import shard_base
from loragrid.planning.solo_run import measure_solo
from loragrid.training.meters import weight_bytes
from loragrid.training.step import Batch, PackModel, StepResult, SumOverWorkers, compute_step
from loragrid.trials.trial import Trial
from loragrid.worker.export import export_member
from tests.support.small_packs import Run, Setup, make_setup, mixed_trials, run_pack


@dataclass
class PackResult:
    """What a worker keeps of one pack: figures and weights by member, and every collective of every step."""

    records: list[dict[int, dict[str, float]]]
    weights: list[dict[str, Tensor]]
    collectives: list[dict[str, list[int]]]
    reduced: list[int]
    """Number of elements of the two tensors that a step sums over workers: gradients and losses."""


@dataclass
class WorkerResult:
    """What a worker keeps for one way of holding the base, whole or sharded."""

    resident_bytes: int
    packs: list[PackResult] = field(default_factory=list)
    solo: dict[str, float] = field(default_factory=dict)


def packs_of(setup: Setup) -> list[tuple[list[Trial], bool]]:
    """Two packs for one base: (trials, whether activations are recomputed). The second also uses micro batches.

    The trials cover all packable methods without a sharding obstacle. None has dropout, which is drawn per worker.
    """

    def mixed(**training: Any) -> list[Trial]:
        trials = mixed_trials(setup, batch_size=8, steps=4, **training)
        return [
            trial
            for trial in trials
            if not trial.method.hyperparameters().get("dropout") and not trial.method.sharding_obstacle
        ]

    return [(mixed(), False), (mixed(micro_batch_size=2)[2:6], True)]


def train_on_whole_and_sharded(worker: int, num_workers: int, model: str, rows: str, dtype: str, folder: str) -> None:
    """Train on the whole, then on the sharded base; save both results, and worker 0's sharded exports, in `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=worker, world_size=num_workers
    )
    setup = make_setup(Path(model), Path(rows), dtype)
    results = {}
    for name in ("whole", "sharded"):
        base = setup.base()
        if name == "sharded":
            shard_base(base, torch.device("cpu"))
        result = WorkerResult(resident_bytes=weight_bytes(base))
        lora = setup.trial("lora", batch_size=8)
        result.solo = measure_solo(lora, base, setup.rows, num_steps=1, num_workers=num_workers)
        for index, (trials, again) in enumerate(packs_of(setup)):
            checkpoint_activations(base, again)
            run, collectives = _train(setup, trials, base, worker, num_workers)
            result.packs.append(
                PackResult(
                    records=run.records,
                    weights=[run.weights(member) for member in range(len(trials))],
                    collectives=collectives,
                    reduced=[len(run.model.pack.gradient_buffer), len(trials)],
                )
            )
            if name == "sharded" and worker == 0:
                for member in range(len(trials)):
                    export_member(run.model, member, setup.model.name, Path(folder) / f"{index}" / f"{member}")
            run.model.pack.detach()
            checkpoint_activations(base, False)
            assert weight_bytes(base) == result.resident_bytes, "the base is given back as it was"
        results[name] = result
    torch.save(results, Path(folder) / f"{worker}.pt")
    torch.distributed.destroy_process_group()


def _train(
    setup: Setup, trials: list[Trial], base: PreTrainedModel, worker: int, num_workers: int
) -> tuple[Run, list[dict[str, list[int]]]]:
    collectives: list[dict[str, list[int]]] = []

    def count(model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
        with _collectives() as seen:
            result = compute_step(model, batch, rates, sum_over_workers)
        collectives.append(seen)
        return result

    run = run_pack(
        setup,
        trials,
        base=base,
        worker=worker,
        num_workers=num_workers,
        sum_over_workers=lambda tensor: torch.distributed.all_reduce(tensor),
        compute=count,
    )
    return run, collectives


@contextmanager
def _collectives() -> Iterator[dict[str, list[int]]]:
    """Records every collective while open: its name -> the number of elements, call by call."""
    with _Collectives() as mode:
        yield mode.seen


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            size = sum(tensor.numel() for tensor in tree_leaves(args[0]) if isinstance(tensor, Tensor))
            self.seen.setdefault(func._opname, []).append(size)
        return func(*args, **(kwargs or {}))
