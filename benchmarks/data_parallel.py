"""Times a pack's step on several GPUs, the base held whole by each or sharded, after showing that the losses are equal.

    PYTHONPATH=platform:methods:. python -m benchmarks.data_parallel --model llama-3.2-1b --workers 1 2 --out table.md
    PYTHONPATH=platform:methods:. python -m benchmarks.data_parallel --model llama-3.1-8b --workers 2 \
        --strategies replicate shard --rows 4

Needs as many CUDA GPUs as workers (or `--device cpu`, with gloo), torch, transformers; no network, no Ray, no MLflow.
Steps are eager: a step of several workers is not captured. Tokens per worker stay the same, so n workers do n times the
work of one.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed
import transformers
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.packs import build_pack, lora, mixed
from benchmarks.shapes import random_base, random_rows, shape_config
from loragrid.attention import use_causal_attention
from loragrid.measurement import wait_for, weight_bytes
from loragrid.sharding import shard_base, whole_head
from loragrid.step import Batch, SumOverWorkers, one_worker, train_step

NUM_WARM_UP, NUM_TIMED, NUM_COMPARED = 3, 9, 10
COMPARED_ROWS = 8
"""The whole batch of the steps whose losses are compared, however many workers share it."""


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
    """One worker: losses of a few steps on a batch that all share, then timed steps on rows of its own."""
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
    methods = lora(1) if job.num_members == 1 else mixed(job.num_members)
    total: SumOverWorkers = one_worker if job.num_workers == 1 else _all_reduce
    model = build_pack(base, methods, NUM_COMPARED + NUM_WARM_UP + NUM_TIMED)
    losses = []
    for step in range(NUM_COMPARED):
        whole = random_rows(vocabulary, job.num_members, COMPARED_ROWS, job.length, device, seed=100 + step % 2)
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


def _all_reduce(tensor: Tensor) -> None:
    torch.distributed.all_reduce(tensor)


def measure(job: Job) -> Result:
    """Run the job's workers to their ends, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (job, folder), nprocs=job.num_workers)
        return Result(**json.loads((Path(folder) / "result.json").read_text(encoding="utf-8")))


def largest_relative_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Over all steps and members."""
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return float(((a - b) / b).abs().max())


def main() -> None:
    """Measure every strategy with every number of workers, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", default=["replicate"], choices=["replicate", "shard"])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rows", type=int, help="of each worker and member; default: 8,192 tokens per worker")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    lines = [
        f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}; {options.model}, steps eager;"
        f" losses of {NUM_COMPARED} steps on {COMPARED_ROWS} rows that all workers share, against the first line's",
        "",
        "| pack | strategy | workers | ms/step | min-max | tokens/s | against the first | per worker | losses differ by"
        " (relative) | GiB of the base | peak GiB per worker |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for num_members in options.members:
        first: tuple[Result, float, int] | None = None
        for strategy in options.strategies:
            for num_workers in options.workers:
                if strategy == "shard" and num_workers == 1:
                    continue  # one worker shares the base with nobody
                rows = options.rows or max(1, 8192 // (num_members * options.length))
                job = Job(
                    model=options.model,
                    strategy=strategy,
                    num_workers=num_workers,
                    device=options.device,
                    num_members=num_members,
                    rows=rows,
                    length=options.length,
                )
                result = measure(job)
                middle = statistics.median(result.seconds)
                speed = num_workers * num_members * rows * options.length / middle
                first = first or (result, speed, num_workers)
                ratio = speed / first[1]
                lines.append(
                    f"| {num_members} × {rows}×{options.length} | {strategy} | {num_workers} | {1000 * middle:.1f} "
                    f"| {1000 * min(result.seconds):.1f}-{1000 * max(result.seconds):.1f} | {speed:,.0f} "
                    f"| {ratio:.2f}× | {ratio * first[2] / num_workers:.2f} "
                    f"| {largest_relative_difference(result.losses, first[0].losses):.1e} "
                    f"| {result.base_bytes / 2**30:.2f} | {result.peak_bytes / 2**30:.2f} |"
                )
                print(lines[-1], flush=True)
    table = "\n".join(lines)
    print(table)
    if options.out:
        options.out.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
