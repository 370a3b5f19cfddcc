"""Times one grid on 1, 2, ... GPUs: trials per hour from start to table, and without the start of the processes.

    PYTHONPATH=platform:methods:. python -m benchmarks.grid_scaling --folder FOLDER --gpus 1 2 --out table.md
    PYTHONPATH=platform:methods:. python -m benchmarks.grid_scaling --folder FOLDER --gpus 1 2 --grid fixed

The grid `growing` has `--trials` LoRA trials for each GPU, in equal packs, so only the machine (Ray, shared processors,
disk) can cause a loss of speed. The grid `fixed` always has the 64 trials of benchmarks.grid; with more GPUs its packs
get smaller and differ between GPUs. Every grid runs in its own process, which sees only its number of GPUs, starts its
own Ray and finds no compiled code. Needs the GPUs (or `--device cpu`: CPU workers) and all of LoraGrid's packages; no
network.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ending import exit_at_sigterm
from benchmarks.grid import LENGTH, STEPS, experiment, prepare_inputs
from benchmarks.sweeps import Outcome, SweepFailedError, check_places, run_sweep, share_of_cpus
from benchmarks.tables import Table, failed, hardware

COLUMNS = (
    "GPUs",
    "trials",
    "packs",
    "queues",
    "training at once",
    "s to the table",
    "trials/hour",
    "of n times the first",
    "s in training",
    "trials/hour in training",
    "of n times the first in training",
    "s in steps, longest pack",
)


def growing(folder: Path, num_trials: int, **sizes: Any) -> dict[str, Any]:
    """A grid of `num_trials` learning rates for LoRA at rank 16: packs of equal size do equal work."""
    rates = [1e-5 * 100 ** (index / num_trials) for index in range(num_trials)]
    methods = [{"name": "lora", "rank": 16, "grid": {"lr": rates}}]
    return {**experiment(folder, 0, **sizes), "name": "growing-grid", "methods": methods}


def cells(outcome: Outcome, num_gpus: int, first: tuple[float, float, int] | None) -> tuple[list[str], float, float]:
    """(Cells of a row, trials per hour from start to table, trials per hour in training).

    first: both speeds of the first row, and its number of GPUs.
    """
    training = outcome.training_seconds()
    num_trials = len(outcome.table)
    whole, trained = 3600 * num_trials / outcome.seconds, 3600 * num_trials / training
    of_whole, of_trained = "1", "1"
    if first is not None:
        more = num_gpus / first[2]
        of_whole, of_trained = f"{whole / first[0] / more:.2f}", f"{trained / first[1] / more:.2f}"
    steps = max(row["time/train_seconds"] for row in outcome.table)
    row = [str(num_gpus), str(num_trials), str(len(outcome.training()))]
    row += [str(outcome.num_queues()), str(outcome.most_at_once())]
    row += [f"{outcome.seconds:.1f}", f"{whole:,.0f}", of_whole, f"{training:.1f}", f"{trained:,.0f}", of_trained]
    return [*row, f"{steps:.1f}"], whole, trained


def measure(table: Table, gpus: list[int], run: Callable[[int], Outcome]) -> list[str]:
    """Add a row for each number of GPUs; return the problems."""
    problems = []
    first: tuple[float, float, int] | None = None
    for num_gpus in gpus:
        try:
            outcome = run(num_gpus)
            row, whole, trained = cells(outcome, num_gpus, first)
        except SweepFailedError as error:
            table.add(num_gpus, failed(str(error)))
            problems.append(f"{num_gpus} GPUs: {error}")
            continue
        first = first or (whole, trained, num_gpus)
        table.add(*row)
        if outcome.num_queues() < num_gpus:
            problems.append(f"{num_gpus} GPUs: the grid ran on only {outcome.num_queues()} of them")
    return problems


def main() -> None:
    """Measure the grid on every number of GPUs; each row is written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="with --device cpu: CPU workers")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--grid", default="growing", choices=["growing", "fixed"])
    parser.add_argument("--trials", type=int, default=32, help="of the growing grid, for each GPU")
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--mode", default="auto", choices=["auto", "eager", "graph", "compiled"])
    parser.add_argument("--timeout", type=float, default=270.0, help="seconds for each grid")
    parser.add_argument("--folder", type=Path, help="for model, rows and stores; default: a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    exit_at_sigterm()
    try:
        check_places(options.device, max(options.gpus))
    except ValueError as error:
        parser.error(f"--gpus: {error}")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = options.folder or Path(temporary)
        prepare_inputs(options.model, folder, options.device, options.length)
        cpus = share_of_cpus(max(options.gpus))
        sizes = {"steps": options.steps, "length": options.length}
        sizes["dtype"] = "bfloat16" if options.device == "cuda" else "float32"

        def run(num_gpus: int) -> Outcome:
            grid = experiment(folder, 0, **sizes)
            if options.grid == "growing":
                grid = growing(folder, options.trials * num_gpus, **sizes)
            grid |= {"workers": {"cpus_per_worker": cpus}, "engine": {"mode": options.mode}}
            if options.device == "cpu":
                # Planning splits packs only for GPUs, because on CPUs one large pack is as good as two small ones.
                num_trials = options.trials * num_gpus if options.grid == "growing" else 64
                grid["pack"] = {"max_members": -(-num_trials // num_gpus)}
            return run_sweep(
                grid,
                folder / f"{options.grid}-on-{num_gpus}",
                device=options.device,
                num_places=num_gpus,
                cpus_per_place=cpus,
                timeout_seconds=options.timeout,
            )

        about = (
            f"{hardware(options.device)}; {options.model}, {options.steps} steps of 1 × {options.length} tokens, "
            f"engine {options.mode}, CPUs per {'GPU' if options.device == 'cuda' else 'worker'}: {cpus}; grid "
            f"{options.grid}. First: from the start of the process to its table. Then: from the first pack's first "
            "step to the last trial's end, so without the start of Ray and of the workers, which is the same for any "
            "number of them."
        )
        problems = measure(Table(options.out, about, COLUMNS), options.gpus, run)
    if problems:
        sys.exit("grid_scaling: " + "; ".join(problems))


if __name__ == "__main__":
    main()
