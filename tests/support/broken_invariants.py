"""Runs packs as a worker does and breaks an invariant of their training once."""

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
from loragrid.worker.pack_trainer import PackTrainer
from loragrid.worker.queue import run_queue
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
    **settings: Any,
) -> Seen:
    """Run packs as a worker does; after step `FLIPPED_AFTER` of the first pack, `spoil` its model once."""
    import loragrid.training.cuda_graphs

    spoiled: list[bool] = []

    def step(model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
        result = compute_step(model, batch, rates, sum_over_workers)
        if model.completed == FLIPPED_AFTER - 1 and not spoiled:
            spoiled.append(True)
            spoil(model)
        return result

    def rows_of(model: ModelConfig, data: DataConfig) -> TokenizedData:
        return setup.rows

    monkeypatch.setattr(loragrid.training.cuda_graphs, "compute_step", step)
    seen = Seen()
    trainer = PackTrainer(rows_of, seen, seen.store, torch.device("cpu"), **{"isolate_failures": True} | settings)
    run_queue([Pack(pack_id=f"pack-{i}", trials=tuple(trials)) for i, trials in enumerate(packs)], trainer, None)
    assert spoiled
    return seen
