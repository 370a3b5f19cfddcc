"""Kills a worker of a pack during training, and compares every member's curves with those of an undisturbed run.

    PYTHONPATH=platform:methods:. python -m benchmarks.worker_loss --folder FOLDER --workers 2 --out table.md

Several workers train one pack of the five methods four times: undisturbed, undisturbed again (to see what the hardware
itself repeats), with the worker of the lowest process id killed, and with that of the highest killed. The worker gets
SIGKILL when every member's state has been saved at a third of the steps or later. Curves are compared to the bit, so
steps run with deterministic kernels (`engine.deterministic`); `--no-deterministic` shows how far other kernels differ.
Needs a GPU per worker (or `--device cpu`, with gloo) and all of LoraGrid's packages; no network.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from benchmarks.ending import exit_at_sigterm
from benchmarks.grid import LENGTH, experiment, prepare_inputs
from benchmarks.sweeps import STORE, Outcome, SweepFailedError, check_places, run_sweep, share_of_cpus
from benchmarks.tables import Table, failed, hardware

NOBODY, LOWEST, HIGHEST = "nobody", "lowest", "highest"
LOSSES = ("train/loss", "eval/loss")
CURVES = (*LOSSES, "train/grad_norm")
METHODS = ("lora", "lora_plus", "lora_fa", "delta_lora", "vera")
COLUMNS = (
    "killed",
    "at step",
    "points compared",
    "missing",
    "doubled",
    "equal to the bit",
    "losses differ by (relative)",
    "gradient norms differ by (relative)",
    "s of the pack",
    "more than undisturbed",
    "s from the kill until it trains again",
)

Curve = list[tuple[int, float]]
"""(Step, value) of every point that MLflow holds, in its order."""
Curves = dict[tuple[str, str], Curve]
"""(Trial id, key) -> its curve."""


class Strike:
    """Kills one of a pack's workers, once, when each of `num_members` states has been saved at `at_step` or later."""

    def __init__(self, folder: Path, *, num_workers: int, num_members: int, at_step: int, which: str) -> None:
        self._states = folder / STORE / "trials"
        self._num_workers, self._num_members, self._at_step = num_workers, num_members, at_step
        self._which = which
        self.step: int | None = None
        """The latest step that was saved before the kill; None before it."""
        self.time = 0.0
        """The Unix time of the kill."""

    def __call__(self, sweep: psutil.Process) -> None:
        """Called by `run_sweep` with the sweep's process."""
        if self.step is not None:
            return
        steps = self._saved_steps()
        if len(steps) < self._num_members or min(steps.values()) < self._at_step:
            return
        try:
            workers = sorted(_train_workers(sweep), key=lambda process: process.pid)
            if len(workers) != self._num_workers:
                return
            workers[0 if self._which == LOWEST else -1].kill()
        except psutil.NoSuchProcess:  # the sweep has just ended
            return
        self.step, self.time = max(steps.values()), time.time()

    def _saved_steps(self) -> dict[str, int]:
        """Trial id -> the step of its latest state."""
        steps: dict[str, int] = {}
        for path in self._states.glob("*/*/*.step-*"):
            step = int(path.name.split(".")[1].removeprefix("step-"))
            steps[path.parent.name] = max(step, steps.get(path.parent.name, 0))
        return steps


def _train_workers(sweep: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in sweep.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join([process.name(), *process.cmdline()]):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def pack_of_five(
    folder: Path, *, num_workers: int, strategy: str, steps: int, deterministic: bool, **sizes: Any
) -> dict[str, Any]:
    """The experiment: five members of rank 4, two rows of each in every worker, states saved six times."""
    asked = experiment(folder, 0, steps=steps, **sizes)
    often = {"report_every": 1, "checkpoint_every": max(1, steps // 6), "eval_every": max(1, steps // 3)}
    return {
        **asked,
        "name": "worker-loss",
        "training": {**asked["training"], **often, "batch_size": 2 * num_workers, "lr": 2e-4},
        "methods": [{"name": name, **({"start_step": 2} if name == "delta_lora" else {})} for name in METHODS],
        "grid": {"method.rank": [4]},
        "pack": {"max_members": len(METHODS)},
        "workers": {"num_workers": num_workers, "strategy": strategy},
        "engine": {"deterministic": deterministic},
    }


def curves(outcome: Outcome) -> Curves:
    """(Trial id, key) -> its curve."""
    client = MlflowClient(tracking_uri=outcome.tracking_uri)
    return {
        (row["trial_id"], key): [(point.step, point.value) for point in client.get_metric_history(row["run_id"], key)]
        for row in outcome.table
        for key in CURVES
    }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Curves compared with others.

    num_points: the others' points. missing: those that ours lack. doubled: points that are in ours twice or only there.
    """

    num_points: int = 0
    missing: int = 0
    doubled: int = 0
    losses: float = 0.0
    """The largest difference of a loss, relative to the other's."""
    norms: float = 0.0
    """The largest difference of a gradient's norm, relative to the other's."""

    @property
    def is_whole(self) -> bool:
        """Whether no point is missing or doubled."""
        return not self.missing and not self.doubled

    @property
    def is_equal(self) -> bool:
        """Whether the curves are equal to the bit."""
        return self.is_whole and self.losses == self.norms == 0


def compare(ours: Curves, theirs: Curves) -> Comparison:
    """Compare every point of every curve in `theirs` with the same point in `ours`."""
    missing = more = 0
    largest = dict.fromkeys(CURVES, 0.0)
    for (trial_id, key), curve in theirs.items():
        own = ours.get((trial_id, key), [])
        expected, found = dict(curve), dict(own)
        missing += len(expected.keys() - found.keys())
        more += len(own) - len(expected.keys() & found.keys())
        for step in expected.keys() & found.keys():
            if found[step] != expected[step]:  # equal infinities have no difference, but their subtraction is NaN
                difference = abs(found[step] - expected[step]) / max(abs(expected[step]), 1e-300)
                largest[key] = max(largest[key], difference)
    return Comparison(
        num_points=sum(len(curve) for curve in theirs.values()),
        missing=missing,
        doubled=more,
        losses=max(largest[key] for key in LOSSES),
        norms=largest["train/grad_norm"],
    )


def check_strike(outcome: Outcome, strike: Strike, steps: int) -> float:
    """Seconds from the kill until the pack reported that it trains again.

    Raises:
        SweepFailedError: no worker was killed before the last step, or none continued from the saved states.
    """
    if strike.step is None or strike.step >= steps:
        raise SweepFailedError("the pack finished before a worker was killed; use more --steps")
    after = [(seconds, text) for seconds, _, text in outcome.lines if outcome.started + seconds > strike.time]
    again = [seconds for seconds, text in after if text == "training"]
    if not again or "going on" not in [text for _, text in after]:
        raise SweepFailedError("a worker was killed, but no other continued from the saved states")
    return outcome.started + again[0] - strike.time


def row_of(outcome: Outcome, calm: Outcome) -> tuple[list[str], bool]:
    """The columns from `points compared` to `more than undisturbed`, and whether no point is missing or doubled."""
    found = compare(curves(outcome), curves(calm))
    seconds = outcome.training_seconds()
    row = [str(found.num_points), str(found.missing), str(found.doubled), "yes" if found.is_equal else "no"]
    row += [f"{found.losses:.1e}", f"{found.norms:.1e}"]
    return [*row, f"{seconds:.1f}", f"{seconds - calm.training_seconds():.1f}"], found.is_whole


def main() -> None:
    """Train the pack undisturbed, then in every way of `--killed`; each row is written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--strategy", default="replicate", choices=["replicate", "shard"])
    ways = [NOBODY, LOWEST, HIGHEST]
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--killed", nargs="+", default=ways, choices=ways, help="of the workers, by process id")
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds for each run")
    parser.add_argument("--folder", type=Path, help="for model, rows and stores; default: a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    exit_at_sigterm()
    if options.workers < 2:
        parser.error(f"--workers: {options.workers}: the benchmark kills one of several workers; allowed: 2 or more")
    try:
        check_places(options.device, options.workers)
    except ValueError as error:
        parser.error(f"--workers: {error}")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = options.folder or Path(temporary)
        prepare_inputs(options.model, folder, options.device, options.length)
        pack = pack_of_five(
            folder,
            num_workers=options.workers,
            strategy=options.strategy,
            steps=options.steps,
            deterministic=options.deterministic,
            length=options.length,
            dtype="bfloat16" if options.device == "cuda" else "float32",
        )
        about = (
            f"{hardware(options.device)}; {options.model}, one pack of {', '.join(METHODS)} on {options.workers} "
            f"workers ({options.strategy}), {options.steps} steps of {2 * options.workers} × {options.length} tokens "
            f"for each member, {'with' if options.deterministic else 'without'} engine.deterministic. Compared: "
            f"{', '.join(CURVES)} of every member, as MLflow holds them, with those of a run before."
        )
        problems = measure(Table(options.out, about, COLUMNS), pack, folder, options)
    if problems:
        sys.exit("worker_loss: " + "; ".join(problems))


def measure(table: Table, pack: dict[str, Any], folder: Path, options: argparse.Namespace) -> Sequence[str]:
    """Add a row for each way; return the problems."""

    def run(name: str, strike: Strike | None = None) -> Outcome:
        return run_sweep(
            pack,
            folder / name,
            device=options.device,
            num_places=options.workers,
            cpus_per_place=share_of_cpus(options.workers),
            timeout_seconds=options.timeout,
            watch=strike or (lambda process: None),
        )

    try:
        calm = run("undisturbed")
    except SweepFailedError as error:
        table.add(NOBODY, "", failed(str(error)))
        return [f"undisturbed: {error}"]
    table.add("the run before", "", "", "", "", "", "", "", f"{calm.training_seconds():.1f}")
    problems = []
    for which in options.killed:
        try:
            if which == NOBODY:
                row, whole = row_of(run(which), calm)
                table.add(which, "", *row)
            else:
                strike = Strike(
                    folder / which,
                    num_workers=options.workers,
                    num_members=len(METHODS),
                    at_step=options.steps // 3,
                    which=which,
                )
                outcome = run(which, strike)
                until_again = check_strike(outcome, strike, options.steps)
                row, whole = row_of(outcome, calm)
                table.add(f"the {which} process id", strike.step, *row, f"{until_again:.1f}")
        except SweepFailedError as error:
            table.add(which, "", failed(str(error)))
            problems.append(f"{which}: {error}")
            continue
        if not whole:
            problems.append(f"{which}: points are missing or doubled")
    return problems


if __name__ == "__main__":
    main()
