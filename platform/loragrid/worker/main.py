"""The body of one training process: it trains a queue of packs and reports through Ray Train."""

import warnings
from functools import lru_cache

import ray.train
import ray.train.torch
import torch

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.config.working_folder import work_in
from loragrid.data.dataset import TokenizedData
from loragrid.training.determinism import compute_deterministically
from loragrid.worker.messages import PackUpdate, WorkerTask
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue import run_queue
from loragrid.worker.queue_worker import build_worker
from loragrid.worker.recovery import left_behind, recover
from loragrid.worker.worker_tags import WorkerEnvironment

LOSSES = {"train_loss": "train/loss", "eval_loss": "eval/loss"}
"""Tune's key of a loss -> LoraGrid's metric key. Tune's searchers cannot read a key with a slash."""


def run_worker(task: WorkerTask) -> None:
    """Train the queue's trials in this process, together with the queue's other workers."""
    work_in(task.folder)
    torch.set_num_threads(task.threads)
    if task.engine.deterministic:
        compute_deterministically()
    # Members share flat buffers, so a gradient is a view with the buffer's strides; this is correct.
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    context = ray.train.get_context()
    number, num_workers = context.get_world_rank(), context.get_world_size()

    @lru_cache(maxsize=1)  # most packs of a queue share their rows, and every fetch copies them
    def rows_of(model: ModelConfig, data: DataConfig) -> TokenizedData:
        rows: TokenizedData = ray.get(task.rows[(model, data)])
        return rows

    group = ProcessGroup(
        device=ray.train.torch.get_device(),
        worker=number,
        num_workers=num_workers,
        isolate_failures=num_workers == 1 and not task.by_tune,
    )
    worker = build_worker(
        rows_of,
        _RayReporter(hold_back=task.by_tune),
        task.store,
        group,
        engine=task.engine,
        early_stopping=task.early_stopping,
        shard=task.shard,
        samples=task.samples,
        # Only worker 0's reports arrive, but all workers must send equally many.
        describe=WorkerEnvironment(group.device, num_workers, shard=task.shard) if number == 0 else lambda *_: {},
    )
    recover(worker, task.queue, left_behind(task.queue, task.store, number, num_workers))
    run_queue(task.queue.packs, worker, task.early_stopping)


class _RayReporter:
    """Sends updates through Ray Train; every worker must send the same number of them, only worker 0's arrive."""

    def __init__(self, *, hold_back: bool) -> None:
        self._hold_back = hold_back
        self._held: PackUpdate | None = None
        self._latest: dict[str, dict[str, float]] = {name: {} for name in LOSSES}

    def __call__(self, update: PackUpdate) -> None:
        """As `SendUpdate`."""
        if self._held is not None:
            update, self._held = update.after(self._held), None
        losses = self._lowest_losses(update)
        if self._hold_back and not update.ended and losses.keys() != LOSSES.keys():
            self._held = update
            return
        ray.train.report({"update": update, "step": update.completed, **losses})

    def _lowest_losses(self, update: PackUpdate) -> dict[str, float]:
        """The values that Tune reads: the lowest of the trials' latest losses, by Tune's key."""
        for trial_id, records in update.records.items():
            for record in records:
                for name, key in LOSSES.items():
                    if key in record:
                        self._latest[name][trial_id] = record[key]
        for trial_id, end in update.ended.items():
            if end.status == "FAILED":
                for losses in self._latest.values():
                    losses[trial_id] = float("inf")
        return {name: min(losses.values()) for name, losses in self._latest.items() if losses}
