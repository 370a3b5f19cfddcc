"""Times a pack's step on several GPUs, with a replicated or a sharded base, after comparing the losses.

    PYTHONPATH=platform:methods:. python -m benchmarks.data_parallel --model llama-3.2-1b --workers 1 2 --out table.md
    PYTHONPATH=platform:methods:. python -m benchmarks.data_parallel --model llama-3.1-8b --members 1 --workers 1 2 \
        --modes eager --strategies replicate shard --out table.md

Needs as many CUDA GPUs as workers (or `--device cpu`, with gloo), torch and transformers; no network, Ray or MLflow.
Every worker has the same number of tokens, so n workers do n times the work of one. Steps with a sharded base are
always eager. If a measurement fails, its row states the reason; unless memory ran out, the script ends with code 1.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from benchmarks.data_parallel_worker import COMPARED_LENGTH, COMPARED_ROWS, NUM_COMPARED, Job, Result, work
from benchmarks.ending import exit_at_sigterm
from benchmarks.shapes import shapes_only
from benchmarks.sweeps import check_places
from benchmarks.tables import Table, failed, hardware
from loragrid.planning.memory_estimate import estimate_memory
from loragrid.training.step_mode import Mode
from loragrid.trials.outcome import OUT_OF_MEMORY

GRACE_SECONDS = 5.0
"""How long to wait for the other workers once one has failed: those that communicate with it may hang forever."""
COLUMNS = (
    "pack",
    "engine",
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
    """A worker of a measurement failed, or the workers did not end in time."""


def measure(job: Job, timeout_seconds: float) -> Result:
    """Run the job's workers, each in its own process; afterwards none of them is left.

    Raises:
        MeasurementError: a worker failed, or the workers did not end in time.
    """
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryDirectory() as folder:
        workers = spawn(work, (job, folder), nprocs=job.num_workers, join=False)
        try:
            while not workers.join(timeout=max(0.0, deadline - time.monotonic()), grace_period=GRACE_SECONDS):
                if time.monotonic() >= deadline:
                    raise MeasurementError(f"not finished after {timeout_seconds:g} s")
        except ProcessExitedException as error:
            # The first failure is the cause; other workers fail because that one is gone.
            reasons = [file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("*.failure"))]
            raise MeasurementError(next(iter(reasons), str(error))) from error
        finally:
            for process in workers.processes:
                process.kill()
                process.join()
        return Result(**json.loads((Path(folder) / "result.json").read_text(encoding="utf-8")))


def planned_bytes(job: Job) -> int:
    """The peak bytes of a worker's steps on a GPU, as `loragrid plan` estimates them."""
    estimate = estimate_memory(
        shapes_only(job.model, job.torch_dtype),
        job.methods,
        num_rows=job.rows,
        length=job.length,
        mode=job.mode,
        num_shares=job.num_workers if job.strategy == "shard" else 1,
    )
    return estimate.total


def largest_relative_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest relative difference of two losses, over all steps and members."""
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return float(((a - b) / b).abs().max())


def measure_all(table: Table, jobs: Sequence[Job], timeout_seconds: float) -> list[str]:
    """Add a row for each job, compared with the first successful job of as many members; return the problems."""
    problems = []
    first: dict[int, tuple[Result, float, int]] = {}
    for job in jobs:
        pack = f"{job.num_members} × {job.rows}×{job.length}"
        way = (job.mode, job.strategy, job.num_workers)
        try:
            result = measure(job, timeout_seconds)
        except MeasurementError as error:
            table.add(pack, *way, failed(str(error)))
            if not str(error).startswith(OUT_OF_MEMORY):
                problems.append(f"{pack}, {job.mode}, {job.strategy}, {job.num_workers} workers: {error}")
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
            *way,
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
    """Measure every mode and strategy with every number of workers; each row is written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on GPUs, float32 on a CPU")
    parser.add_argument("--modes", nargs="+", choices=["eager", "graph", "compiled"], help="default: graph; CPU: eager")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", default=["replicate"], choices=["replicate", "shard"])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rows", type=int, help="of each worker and member; default: 8,192 tokens per worker")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--timeout", type=float, default=170.0, help="seconds for each row")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    exit_at_sigterm()
    try:
        check_places(options.device, max(options.workers))
    except ValueError as error:
        parser.error(f"--workers: {error}")
    if uneven := [number for number in options.workers if COMPARED_ROWS % number]:
        parser.error(f"--workers: {uneven[0]} workers cannot share {COMPARED_ROWS} rows; allowed: 1, 2, 4, 8")
    modes = options.modes or ["graph" if options.device == "cuda" else "eager"]
    if options.device == "cpu" and modes != ["eager"]:
        parser.error(f"--modes: {', '.join(modes)}: nothing is captured on a CPU; allowed: eager")
    jobs = jobs_of(options, modes)
    if not jobs:
        parser.error("--workers: 1: a sharded base needs several workers; allowed with --strategies shard: 2, 4, 8")
    about = (
        f"{hardware(options.device)}; {options.model}, {jobs[0].dtype}. Losses: of {NUM_COMPARED} steps of "
        f"{COMPARED_ROWS} rows of {min(COMPARED_LENGTH, options.length)} tokens for each member, which all workers "
        "share, against those of the first row with as many members. Peak: the most that a worker has allocated in "
        "timed steps; plan: the estimate of `loragrid plan`."
    )
    problems = measure_all(Table(options.out, about, COLUMNS), jobs, options.timeout)
    if problems:
        sys.exit("data_parallel: " + "; ".join(problems))


def jobs_of(options: argparse.Namespace, modes: Sequence[Mode]) -> list[Job]:
    """The jobs, one per row of the table. A sharded base needs several workers and runs eagerly."""
    ways: list[tuple[str, Mode]] = [("replicate", mode) for mode in modes if "replicate" in options.strategies]
    ways += [("shard", "eager")] if "shard" in options.strategies else []
    return [
        Job(
            model=options.model,
            strategy=strategy,
            num_workers=num_workers,
            device=options.device,
            num_members=num_members,
            rows=options.rows or max(1, 8192 // (num_members * options.length)),
            length=options.length,
            mode=mode,
            dtype=options.dtype or ("bfloat16" if options.device == "cuda" else "float32"),
        )
        for num_members in options.members
        for strategy, mode in ways
        for num_workers in options.workers
        if strategy == "replicate" or num_workers > 1
    ]


if __name__ == "__main__":
    main()
