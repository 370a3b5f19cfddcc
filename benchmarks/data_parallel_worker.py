"""A worker of `data_parallel`: computes losses on batches that all workers share, then times steps on its own rows."""

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.packs import build_pack, lora, mixed
from benchmarks.shapes import random_base, random_rows, shape_config
from loragrid.models.attention import use_causal_attention
from loragrid.models.sharding import shard_base, whole_head
from loragrid.training.compilation import compile_layers, fuse_pieces
from loragrid.training.cuda_graphs import STEPS_BEFORE_CAPTURE
from loragrid.training.failure import Failure
from loragrid.training.meters import wait_for, weight_bytes
from loragrid.training.step import Batch, PackModel, StepResult, SumOverWorkers, one_worker, train_step
from loragrid.training.step_mode import Mode, ModeChoice
from loragrid.training.step_runner import StepRunner
from loragrid_methods import Method

NUM_WARM_UP, NUM_TIMED, NUM_COMPARED = STEPS_BEFORE_CAPTURE + 2, 9, 10
COMPARED_ROWS, COMPARED_LENGTH = 8, 64
"""Rows and length of each member's whole batch in the compared steps, for any number of workers."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement, the same for all its workers. rows: per worker, member and step. length: tokens per row."""

    model: str
    strategy: str
    num_workers: int
    device: str
    num_members: int
    rows: int
    length: int
    mode: Mode = "eager"
    dtype: str = "float32"

    @property
    def methods(self) -> list[Method]:
        """The members: one LoRA, or a mix of all five methods."""
        return lora(1) if self.num_members == 1 else mixed(self.num_members)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The base's dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True, kw_only=True)
class Result:
    """Worker 0's report: seconds of each timed step, losses (steps, members), bytes; the peak is over all workers."""

    seconds: list[float]
    losses: list[list[float]]
    base_bytes: int
    peak_bytes: int


def share_of(batch: Batch, num_members: int, worker: int, num_workers: int) -> Batch:
    """This worker's rows of every member; the number of labels stays that of the whole batch."""

    def cut(rows: Tensor) -> Tensor:
        by_member = rows.unflatten(0, (num_members, -1))
        size = by_member.shape[1] // num_workers
        own: Tensor = by_member[:, worker * size : (worker + 1) * size].flatten(0, 1).contiguous()
        return own

    return Batch(
        input_ids=cut(batch.input_ids),
        label_positions=cut(batch.label_positions),
        label_targets=cut(batch.label_targets),
        num_labels=batch.num_labels,
    )


def work(worker: int, job: Job, folder: str) -> None:
    """Run one worker. If it fails, it writes the reason to a file and exits at once.

    It exits without cleaning up, because NCCL may wait for the other workers as long as they live.
    """
    try:
        _work(worker, job, Path(folder))
    except Exception as error:
        failure = Failure.of(error)
        print(failure.traceback, file=sys.stderr, flush=True)
        Path(folder, f"{time.monotonic_ns():020d}.failure").write_text(failure.reason, encoding="utf-8")
        os._exit(1)


def _work(worker: int, job: Job, folder: Path) -> None:
    # Members share flat buffers, so a gradient is a view with the buffer's strides: correct, and not worth a warning.
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    on_gpu = job.device == "cuda"
    device = torch.device("cuda", worker) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/meeting", rank=worker, world_size=job.num_workers
    )
    base = _base(job, device)
    model = build_pack(base, job.methods, NUM_COMPARED + NUM_WARM_UP + NUM_TIMED)
    if job.mode != "eager":
        fuse_pieces(model)
    if job.mode == "compiled":
        compile_layers(base)
    losses = _compared_losses(model, job, worker)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _timed_steps(model, job, worker)
    peak = torch.tensor([float(torch.cuda.max_memory_allocated(device)) if on_gpu else 0.0], device=device)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if worker == 0:
        result = Result(seconds=seconds, losses=losses, base_bytes=weight_bytes(base), peak_bytes=int(peak))
        (folder / "result.json").write_text(json.dumps(asdict(result)), encoding="utf-8")
    torch.distributed.barrier()
    del model, base  # frees FSDP's streams and hooks before the process group that they use
    gc.collect()
    torch.distributed.destroy_process_group()


def _base(job: Job, device: torch.device) -> PreTrainedModel:
    base = random_base(job.model, device, job.torch_dtype)
    if job.strategy == "shard":
        base.to("cpu")  # type: ignore[arg-type]  # transformers narrows torch's own signature
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        shard_base(base, device)
    if device.type == "cuda":
        rows = random_rows(shape_config(job.model).vocab_size, 1, 2, 64, device, seed=0)
        with whole_head(base):
            use_causal_attention(base, rows.input_ids)
    return base


def _compared_losses(model: PackModel, job: Job, worker: int) -> list[list[float]]:
    """Losses (steps, members) of batches that all workers share."""
    step, length = _stepper(model, job), min(COMPARED_LENGTH, job.length)
    losses = []
    for index in range(NUM_COMPARED):
        whole = _rows(job, COMPARED_ROWS, length, model.active.device, seed=100 + index % 2)
        losses.append(step(share_of(whole, job.num_members, worker, job.num_workers)).losses.double().tolist())
    return losses


def _timed_steps(model: PackModel, job: Job, worker: int) -> list[float]:
    """Seconds of each step on this worker's own rows, without the warm-up; all workers begin each step together."""
    step, device = _stepper(model, job), model.active.device
    seconds = []
    for index in range(NUM_WARM_UP + NUM_TIMED):
        own = _rows(job, job.rows, job.length, device, seed=1000 * worker + index)
        batch = Batch(**(vars(own) | {"num_labels": own.num_labels * job.num_workers}))
        wait_for(device)
        torch.distributed.barrier()
        start = time.perf_counter()
        step(batch)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return seconds[NUM_WARM_UP:]


def _stepper(model: PackModel, job: Job) -> Callable[[Batch], StepResult]:
    """Return a function that runs steps of one shape in the job's mode; a failed capture is an error."""
    engine = StepRunner(ModeChoice(mode=job.mode, reason="benchmark"))
    total: SumOverWorkers = one_worker if job.num_workers == 1 else _all_reduce

    def step(batch: Batch) -> StepResult:
        result = train_step(model, batch, total, engine)
        if engine.choice.mode != job.mode:
            raise RuntimeError(engine.choice.reason)
        return result

    return step


def _rows(job: Job, num_rows: int, length: int, device: torch.device, seed: int) -> Batch:
    return random_rows(shape_config(job.model).vocab_size, job.num_members, num_rows, length, device, seed=seed)


def _all_reduce(tensor: Tensor) -> None:
    torch.distributed.all_reduce(tensor)
