"""The bodies of real processes that train packs together, as the workers of one pack do."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed

from loragrid.training.cuda_graphs import Engine
from loragrid.training.step_mode import EngineChoice, Mode
from loragrid.trials.packing import Pack
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate
from loragrid.worker.pack_trainer import PackTrainer
from loragrid.worker.queue import run_queue
from tests.support.small_packs import base_on, look_at_values, make_setup, run_pack, worker_packs


def train_as_worker(
    worker: int,
    num_workers: int,
    model_folder: str,
    rows_file: str,
    folder: str,
    micro_batch_size: int | None,
    backend: str,
    mode: Mode,
    not_captured: Sequence[int] = (),
) -> None:
    """The body of one of several real processes: train `worker_packs`, leave figures and weights in `folder`.

    Captured on GPUs: with gloo all on the first, with NCCL on one each. In the workers `not_captured` that fails.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    device = torch.device("cpu" if mode == "eager" else f"cuda:{worker if backend == 'nccl' else 0}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=worker, world_size=num_workers
    )
    setup = make_setup(Path(model_folder), Path(rows_file), "float64")
    results = []
    for trials in worker_packs(setup, micro_batch_size):
        engine = Engine(EngineChoice(mode=mode, reason="test"))
        run = run_pack(
            setup,
            trials,
            base=base_on(setup, device),
            worker=worker,
            num_workers=num_workers,
            sum_over_workers=lambda tensor: torch.distributed.all_reduce(tensor),
            prepare=look_at_values if worker in not_captured else lambda model: None,
            compute=engine,
        )
        assert engine.choice.mode == ("eager" if worker in not_captured else mode), engine.choice.reason
        weights = [run.weights(member) for member in range(len(trials))]
        results.append({"records": run.records, "weights": weights})
    torch.save(results, Path(folder) / f"{worker}.pt")
    torch.distributed.destroy_process_group()


def run_queue_as_worker(
    worker: int, num_workers: int, model_folder: str, rows_file: str, folder: str, free: Sequence[float]
) -> None:
    """The body of one of several real processes: run a queue of four trials while `free[worker]` bytes are free.

    Leaves what it sent in `folder`.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=worker,
        world_size=num_workers,
        timeout=timedelta(seconds=60),  # who waits for a worker that went its own way fails then
    )
    setup = make_setup(Path(model_folder), Path(rows_file), "float64")
    updates: list[PackUpdate] = []
    trainer = PackTrainer(
        lambda model, data: setup.rows,
        lambda update: updates.append(update),
        TrialStore(f"{folder}/store"),
        torch.device("cpu"),
        worker=worker,
        num_workers=num_workers,
    )
    trials = [setup.trial(name, seed=seed, steps=4, measure_steps=1) for name in ("lora", "vera") for seed in (0, 1)]
    with mock.patch("loragrid.worker.pack_trainer.free_memory", return_value=free[worker]):
        run_queue([Pack(pack_id="pack-000", trials=tuple(trials))], trainer, None)
    torch.save(updates, Path(folder) / f"{worker}.pt")
    torch.distributed.destroy_process_group()
