"""Runs packs as a worker does, and breaks one invariant of training on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.training.step import Batch, PackModel, StepResult, SumOverWorkers, compute_step
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue import run_queue
from loragrid.worker.queue_worker import build_worker
from tests.support.queue_runs import Seen
from tests.support.small_packs import Setup

FLIPPED_AFTER = 4


def first_stack(model: PackModel, member: int = 0) -> Any:
    return next(iter(model.pack.member_stacks(member)[0].values()))


def queue_with(
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    packs: list[list[Trial]],
    spoil: Callable[[PackModel], object],
    *,
    isolate_failures: bool = True,
) -> Seen:
    """Run packs as a worker does; call `spoil` once, on the first model that completes step `FLIPPED_AFTER`."""
    import loragrid.training.step_runner

    spoiled: list[bool] = []

    def step(model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
        result = compute_step(model, batch, rates, sum_over_workers)
        if model.completed == FLIPPED_AFTER - 1 and not spoiled:
            spoiled.append(True)
            spoil(model)
        return result

    def rows_of(model: ModelConfig, data: DataConfig) -> TokenizedData:
        return setup.rows

    monkeypatch.setattr(loragrid.training.step_runner, "compute_step", step)
    seen = Seen()
    group = ProcessGroup(device=torch.device("cpu"), isolate_failures=isolate_failures)
    worker = build_worker(rows_of, seen, seen.store, group)
    run_queue([Pack(pack_id=f"pack-{i}", trials=tuple(trials)) for i, trials in enumerate(packs)], worker, None)
    assert spoiled
    return seen
