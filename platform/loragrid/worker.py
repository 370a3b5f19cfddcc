"""What one training process of a lane does: its packs, reported through Ray Train."""

import warnings
from functools import lru_cache
from pathlib import Path

import ray.train
import ray.train.torch
import torch

from loragrid.checkpoint import load_checkpoint
from loragrid.config import DataConfig, ModelConfig
from loragrid.data import TokenizedData
from loragrid.lane_run import run_lane
from loragrid.messages import PackUpdate, WorkerTask
from loragrid.pack_trainer import PackTrainer

LOSSES = {"train_loss": "train/loss", "eval_loss": "eval/loss"}
"""Tune's key of a loss -> ours. Tune's searchers cannot read a key with a slash."""


def run_worker(task: WorkerTask) -> None:
    """Train the lane's trials in this process, together with the lane's other workers."""
    torch.set_num_threads(task.threads)
    # Members share flat buffers, so a gradient is a view with the buffer's strides: correct, and not worth a warning.
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    context = ray.train.get_context()
    worker, num_workers = context.get_world_rank(), context.get_world_size()

    @lru_cache(maxsize=1)  # a lane's packs mostly share their rows, and every fetch would copy them
    def rows_of(model: ModelConfig, data: DataConfig) -> TokenizedData:
        rows: TokenizedData = ray.get(task.rows[(model, data)])
        return rows

    trainer = PackTrainer(
        rows_of,
        _RayReporter(worker, hold_back=task.by_tune),
        ray.train.torch.get_device(),
        engine_mode=task.engine_mode,
        early_stopping=task.early_stopping,
        worker=worker,
        num_workers=num_workers,
        shard=task.shard,
        isolate_failures=num_workers == 1 and not task.by_tune,
    )
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.states.update(load_checkpoint(Path(folder)))
    run_lane(task.lane.packs, trainer, None if task.by_tune else task.early_stopping)


class _RayReporter:
    """Sends updates through Ray Train; every worker must send the same number of them, worker 0's arrive."""

    def __init__(self, worker: int, *, hold_back: bool) -> None:
        self.worker = worker
        self._hold_back = hold_back
        self._held: PackUpdate | None = None
        self._latest: dict[str, dict[str, float]] = {name: {} for name in LOSSES}

    def __call__(self, update: PackUpdate, folder: Path | None = None) -> None:
        """As `SendUpdate`."""
        if self._held is not None:
            update, self._held = update.after(self._held), None
        losses = self._lowest_losses(update)
        if self._hold_back and folder is None and not update.ended and losses.keys() != LOSSES.keys():
            self._held = update
            return
        checkpoint = None
        if folder is not None and self.worker == 0:
            # Ray copies it before `report` returns.
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"update": update, "step": update.completed, **losses}, checkpoint=checkpoint)

    def _lowest_losses(self, update: PackUpdate) -> dict[str, float]:
        """What Tune's schedulers and searchers read: the lowest of the members' latest losses, by Tune's key."""
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
