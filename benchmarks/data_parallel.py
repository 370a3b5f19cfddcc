"""Times a pack's step on several GPUs, the base held whole by each or sharded, after showing that the losses are equal.

    PYTHONPATH=platform:methods:. python -m benchmarks.data_parallel --model llama-3.2-1b --workers 1 2 --out table.md
    PYTHONPATH=platform:methods:. python -m benchmarks.data_parallel --model llama-3.1-8b --members 1 --workers 1 2 \
        --strategies replicate shard --out table.md

Needs as many CUDA GPUs as workers (or `--device cpu`, with gloo), torch, transformers; no network, no Ray, no MLflow.
Steps are eager: a step of several workers is not captured. Tokens per worker stay the same, so n workers do n times the
work of one. What does not fit is a row that says so; anything else that fails is too, and ends the script with code 1.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from benchmarks.packs import build_pack, lora, mixed
from benchmarks.shapes import random_base, random_rows, shape_config, shapes_alone
from benchmarks.sweeps import check_places
from benchmarks.tables import Table, failed, hardware
from loragrid.attention import use_causal_attention
from loragrid.failure import Failure
from loragrid.glossary import OUT_OF_MEMORY
from loragrid.measurement import wait_for, weight_bytes
from loragrid.memory_estimate import estimate_memory
from loragrid.sharding import shard_base, whole_head
from loragrid.step import Batch, SumOverWorkers, one_worker, train_step
from loragrid_methods import Method

NUM_WARM_UP, NUM_TIMED, NUM_COMPARED = 3, 9, 10
COMPARED_ROWS, COMPARED_LENGTH = 8, 64
"""Each member's whole batch in the steps whose losses are compared, however many workers share it."""
GRACE_SECONDS = 5.0
"""How long workers are waited for once one has failed: those that talk to it may hang for ever."""
COLUMNS = (
    "pack",
    "strategy",
    "workers",
    "ms/step",
    "min-max",
    "tokens/s",
    "against the first",
    "per worker",
    "losses differ by (relative)",
    "GiB of the base",
    "peak GiB per worker",
    "plan GiB",
)


class MeasurementError(RuntimeError):
    """A measurement's workers did not come to their ends."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all workers of one measurement do. rows: of each worker and member in a step. length: tokens of a row."""

    model: str
    strategy: str
    num_workers: int
    device: str
    num_members: int
    rows: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What worker 0 reports: seconds of each timed step, losses (steps, members), bytes; peaks are the most of all."""

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
    """One worker. One that fails says why and is gone at once: NCCL may wait for the others as long as they live."""
    try:
        _work(worker, job, folder)
    except Exception as error:
        failure = Failure.of(error)
        print(failure.traceback, file=sys.stderr, flush=True)
        Path(folder, f"{time.monotonic_ns():020d}.failure").write_text(failure.reason, encoding="utf-8")
        os._exit(1)


def _work(worker: int, job: Job, folder: str) -> None:
    """Losses of a few steps on a batch that all workers share, then timed steps on rows of its own."""
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
    dtype = torch.bfloat16 if on_gpu else torch.float32
    base = random_base(job.model, device, dtype)
    if job.strategy == "shard":
        base.to("cpu")  # type: ignore[arg-type]  # transformers narrows torch's own signature
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        shard_base(base, device)
    vocabulary = shape_config(job.model).vocab_size
    with whole_head(base):
        if on_gpu:
            use_causal_attention(base, random_rows(vocabulary, 1, 2, 64, device, seed=0).input_ids)
    total: SumOverWorkers = one_worker if job.num_workers == 1 else _all_reduce
    model = build_pack(base, _methods(job.num_members), NUM_COMPARED + NUM_WARM_UP + NUM_TIMED)
    losses = []
    for step in range(NUM_COMPARED):
        length = min(COMPARED_LENGTH, job.length)
        whole = random_rows(vocabulary, job.num_members, COMPARED_ROWS, length, device, seed=100 + step % 2)
        batch = share_of(whole, job.num_members, worker, job.num_workers)
        losses.append(train_step(model, batch, total).losses.double().tolist())
    seconds = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(NUM_WARM_UP + NUM_TIMED):
        own = random_rows(vocabulary, job.num_members, job.rows, job.length, device, seed=1000 * worker + step)
        batch = Batch(**(vars(own) | {"num_labels": own.num_labels * job.num_workers}))
        wait_for(device)
        torch.distributed.barrier()
        start = time.perf_counter()
        train_step(model, batch, total)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.tensor([float(torch.cuda.max_memory_allocated(device)) if on_gpu else 0.0], device=device)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if worker == 0:
        result = Result(
            seconds=seconds[NUM_WARM_UP:], losses=losses, base_bytes=weight_bytes(base), peak_bytes=int(peak)
        )
        (Path(folder) / "result.json").write_text(json.dumps(asdict(result)), encoding="utf-8")
    torch.distributed.barrier()
    del model, base  # FSDP's streams and hooks go before the process group that they use
    gc.collect()
    torch.distributed.destroy_process_group()


def measure(job: Job, timeout_seconds: float) -> Result:
    """Run the job's workers, each in a process of its own.

    Raises:
        MeasurementError: one has failed, or they did not end in time. None of them is left.
    """
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryDirectory() as folder:
        workers = spawn(work, (job, folder), nprocs=job.num_workers, join=False)
        try:
            while not workers.join(timeout=max(0.0, deadline - time.monotonic()), grace_period=GRACE_SECONDS):
                if time.monotonic() >= deadline:
                    raise MeasurementError(f"not at its end after {timeout_seconds:g} s")
        except ProcessExitedException as error:
            # The first to fail is the cause: others fail because it is gone.
            reasons = [file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("*.failure"))]
            raise MeasurementError(next(iter(reasons), str(error))) from error
        finally:
            for process in workers.processes:
                process.kill()
                process.join()
        return Result(**json.loads((Path(folder) / "result.json").read_text(encoding="utf-8")))


def planned_bytes(job: Job) -> int:
    """What `loragrid plan` says that a worker holds at the peak of its steps on a GPU."""
    estimate = estimate_memory(
        shapes_alone(job.model, torch.bfloat16),
        _methods(job.num_members),
        num_rows=job.rows,
        length=job.length,
        num_shares=job.num_workers if job.strategy == "shard" else 1,
    )
    return estimate.total


def largest_relative_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Over all steps and members."""
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return float(((a - b) / b).abs().max())


def measure_all(table: Table, jobs: Sequence[Job], timeout_seconds: float) -> list[str]:
    """A row for each job, compared with the first of as many members that came to its end; gives what went wrong."""
    problems = []
    first: dict[int, tuple[Result, float, int]] = {}
    for job in jobs:
        pack = f"{job.num_members} × {job.rows}×{job.length}"
        try:
            result = measure(job, timeout_seconds)
        except MeasurementError as error:
            table.add(pack, job.strategy, job.num_workers, failed(str(error)))
            if not str(error).startswith(OUT_OF_MEMORY):
                problems.append(f"{pack}, {job.strategy}, {job.num_workers} workers: {error}")
            continue
        middle = statistics.median(result.seconds)
        speed = job.num_workers * job.num_members * job.rows * job.length / middle
        against = ["1", "1", "the first"]
        if job.num_members in first:
            reference, its_speed, its_workers = first[job.num_members]
            ratio = speed / its_speed
            difference = largest_relative_difference(result.losses, reference.losses)
            against = [f"{ratio:.2f}", f"{ratio * its_workers / job.num_workers:.2f}", f"{difference:.1e}"]
        else:
            first[job.num_members] = (result, speed, job.num_workers)
        table.add(
            pack,
            job.strategy,
            job.num_workers,
            f"{1000 * middle:.1f}",
            f"{1000 * min(result.seconds):.1f}-{1000 * max(result.seconds):.1f}",
            f"{speed:,.0f}",
            *against,
            f"{result.base_bytes / 2**30:.2f}",
            f"{result.peak_bytes / 2**30:.2f}",
            f"{planned_bytes(job) / 2**30:.2f}",
        )
    return problems


def main() -> None:
    """Measure every strategy with every number of workers; a row is written when it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", default=["replicate"], choices=["replicate", "shard"])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rows", type=int, help="of each worker and member; default: 8,192 tokens per worker")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--timeout", type=float, default=170.0, help="seconds for each row")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        check_places(options.device, max(options.workers))
    except ValueError as error:
        parser.error(f"--workers: {error}")
    if uneven := [number for number in options.workers if COMPARED_ROWS % number]:
        parser.error(f"--workers: {uneven[0]} workers cannot share {COMPARED_ROWS} rows; allowed: 1, 2, 4, 8")
    jobs = [
        Job(
            model=options.model,
            strategy=strategy,
            num_workers=num_workers,
            device=options.device,
            num_members=num_members,
            rows=options.rows or max(1, 8192 // (num_members * options.length)),
            length=options.length,
        )
        for num_members in options.members
        for strategy in options.strategies
        for num_workers in options.workers
        if strategy == "replicate" or num_workers > 1  # one worker shares the base with nobody
    ]
    about = (
        f"{hardware(options.device)}; {options.model}, steps eager. Losses: of {NUM_COMPARED} steps of "
        f"{COMPARED_ROWS} rows of {min(COMPARED_LENGTH, options.length)} tokens for each member, which all workers "
        "share, against those of the first row with as many members. Peak: the most that a worker has allocated in "
        "timed steps; plan: what `loragrid plan` says of a GPU."
    )
    problems = measure_all(Table(options.out, about, COLUMNS), jobs, options.timeout)
    if problems:
        sys.exit("data_parallel: " + "; ".join(problems))


def _all_reduce(tensor: Tensor) -> None:
    torch.distributed.all_reduce(tensor)


def _methods(num_members: int) -> list[Method]:
    return lora(1) if num_members == 1 else mixed(num_members)


if __name__ == "__main__":
    main()
