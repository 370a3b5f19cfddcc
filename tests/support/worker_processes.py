"""The bodies of worker processes that train packs together."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed

from loragrid.training.step_mode import Mode, ModeChoice
from loragrid.training.step_runner import StepRunner
from loragrid.trials.packing import Pack
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue import run_queue
from loragrid.worker.queue_worker import build_worker
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
    """The body of a worker process: trains `worker_packs` and saves figures and weights in `folder`.

    mode: eager runs on CPUs, the others on GPUs (gloo: all workers on the first GPU; NCCL: one GPU each).
    not_captured: the workers in which capture must fail.
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
        engine = StepRunner(ModeChoice(mode=mode, reason="test"))
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
    """The body of a worker process: runs a queue of four trials while `free[worker]` bytes seem to be free.

    It saves its updates in `folder`.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=worker,
        world_size=num_workers,
        timeout=timedelta(seconds=60),  # a worker fails after this if another took a different path
    )
    setup = make_setup(Path(model_folder), Path(rows_file), "float64")
    updates: list[PackUpdate] = []
    group = ProcessGroup(device=torch.device("cpu"), worker=worker, num_workers=num_workers)
    store = TrialStore(f"{folder}/store")
    queue_worker = build_worker(lambda model, data: setup.rows, lambda update: updates.append(update), store, group)
    trials = [setup.trial(name, seed=seed, steps=4, measure_steps=1) for name in ("lora", "vera") for seed in (0, 1)]
    with mock.patch("loragrid.worker.room.free_memory", return_value=free[worker]):
        run_queue([Pack(pack_id="pack-000", trials=tuple(trials))], queue_worker, None)
    torch.save(updates, Path(folder) / f"{worker}.pt")
    torch.distributed.destroy_process_group()
