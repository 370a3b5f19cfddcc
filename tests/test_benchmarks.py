"""The benchmarks that run without a GPU, at toy size: their tables report every result and every failure."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import grid_scaling
from benchmarks.data_parallel import measure_all
from benchmarks.data_parallel_worker import Job
from benchmarks.shapes import random_base, shapes_only
from benchmarks.solo_costs import SHAPES, Setting, compare_procedures
from benchmarks.sweeps import Outcome, SweepFailedError, run_sweep
from benchmarks.tables import Table
from benchmarks.worker_loss import HIGHEST, Comparison, Strike, check_strike, compare
from loragrid.training.step_mode import choose_mode, features_of_step
from loragrid_methods.stacks.targets import adaptable_layers

ROOT = Path(__file__).parent.parent
STRATEGIES = ("replicate", "shard")


def run_benchmark(name: str, *options: str, table: Path) -> tuple[int, str]:
    """(Exit code, what it said of errors) of a benchmark on this machine's processors."""
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "platform", ROOT / "methods", ROOT)))}
    environment = {**os.environ, **paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--model", "tiny", "--device", "cpu", "--out", str(table)]
    command += ["--timeout", "280"]  # a machine may have much else to do
    done = subprocess.run(
        [*command, *options], cwd=table.parent, env=environment, stderr=subprocess.PIPE, text=True, timeout=590
    )
    print(done.stderr)
    return done.returncode, done.stderr


def rows_of(table: Path) -> list[dict[str, str]]:
    """The table's rows, by the names of its columns."""
    lines = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows]


@pytest.mark.end_to_end
@pytest.mark.xdist_group("benchmark-data-parallel")
def test_workers_have_the_losses_of_one_with_either_strategy(tmp_path: Path) -> None:
    options = ["--workers", "1", "2", "--strategies", *STRATEGIES, "--members", "1", "5", "--rows", "2"]
    code, said = run_benchmark("data_parallel", *options, "--length", "32", table=tmp_path / "table.md")
    assert code == 0, said
    rows = rows_of(tmp_path / "table.md")
    assert [(row["pack"], row["strategy"], row["workers"]) for row in rows] == [
        (f"{members} × 2×32", strategy, workers)
        for members in ("1", "5")
        for strategy, workers in (("replicate", "1"), ("replicate", "2"), ("shard", "2"))
    ]
    for row in rows:
        assert float(row["ms/step"]) > 0
        difference = row["losses differ by (relative)"]
        if (row["strategy"], row["workers"]) == ("replicate", "1"):
            assert difference == "the first"
        else:
            assert float(difference) < 1e-5  # float32's rounding, in sums of another order, over ten steps


@pytest.mark.end_to_end
@pytest.mark.xdist_group("benchmark-failed-measurement")
def test_a_failed_measurement_is_a_row_with_its_reason(tmp_path: Path) -> None:
    def job(*, model: str = "tiny", rows: int = 1, num_workers: int = 1) -> Job:
        return Job(
            model=model,
            strategy="replicate",
            num_workers=num_workers,
            device="cpu",
            num_members=1,
            rows=rows,
            length=32,
        )

    jobs = [job(rows=10**12), job(model="no-such-shapes"), job()]
    table = Table(tmp_path / "table.md", "about", [f"column {number}" for number in range(13)])
    problems = measure_all(table, jobs, timeout_seconds=200)
    too_large, unknown, good = [row["column 4"] for row in rows_of(tmp_path / "table.md")]
    assert too_large.startswith("failed: out_of_memory: ")
    assert unknown.startswith("failed: unknown shapes 'no-such-shapes'; allowed: ")
    assert float(good) > 0
    assert len(problems) == 1, "what does not fit is a result"
    assert "no-such-shapes" in problems[0]
    (problem,) = measure_all(table, [job(num_workers=2)], timeout_seconds=0.5)
    assert problem.endswith("not finished after 0.5 s")
    assert rows_of(tmp_path / "table.md")[-1]["column 4"] == "failed: not finished after 0.5 s"


def test_a_failed_sweep_is_a_row_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    def run(num_gpus: int) -> Outcome:
        return run_sweep(
            {"name": "no experiment"},
            tmp_path / str(num_gpus),
            device="cpu",
            num_places=num_gpus,
            cpus_per_place=1,
            timeout_seconds=0.2 if num_gpus == 1 else 300,
        )

    table = Table(tmp_path / "table.md", "about", grid_scaling.COLUMNS)
    problems = grid_scaling.measure(table, [1, 2], run)
    reasons = ["not finished after 0.2 s", "its process has ended with code 1"]
    assert [row["trials"] for row in rows_of(tmp_path / "table.md")] == [f"failed: {reason}" for reason in reasons]
    assert problems == [f"{number} GPUs: {reason}" for number, reason in enumerate(reasons, start=1)]
    left = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert not [command for command in left if str(tmp_path) in command]


def test_a_row_of_the_grid_is_compared_with_the_first() -> None:
    def outcome(num_trials: int, seconds: float, lines: list[tuple[float, str, str]]) -> Outcome:
        table = [{"trial_id": str(index), "time/train_seconds": 5.0 + index} for index in range(num_trials)]
        return Outcome(tracking_uri="", name="", started=0.0, seconds=seconds, lines=lines, table=table)

    one = [
        (8.0, "a", "2 trials, starting workers"),
        (20.0, "a", "training"),
        (22.0, "a", "step 3/9"),
        (30.0, "a", "done"),
    ]
    row, whole, trained = grid_scaling.cells(outcome(2, 40.0, one), 1, None)
    assert row == ["1", "2", "1", "1", "1", "40.0", "180", "1", "10.0", "720", "1", "6.0"]
    # The second queue is late, begins anew where its worker was lost, and overlaps with the first.
    two = [(8.0, pack, "2 trials, starting workers") for pack in "ab"]
    two += [(20.0, "a", "training"), (24.0, "b", "training"), (28.0, "b", "training"), (30.0, "a", "done (2 of 4)")]
    two += [(36.0, "b", "done (4 of 4)")]
    row, *_ = grid_scaling.cells(outcome(4, 50.0, two), 2, (whole, trained, 1))
    assert row == ["2", "4", "2", "2", "2", "50.0", "288", "0.80", "16.0", "900", "0.62", "8.0"]


@pytest.mark.end_to_end
@pytest.mark.xdist_group("benchmark-grid-scaling")
def test_a_grid_on_two_places_has_a_queue_on_each(tmp_path: Path) -> None:
    options = ["--gpus", "1", "2", "--trials", "2", "--steps", "4", "--length", "32"]
    code, said = run_benchmark("grid_scaling", *options, table=tmp_path / "table.md")
    assert code == 0, said
    rows = rows_of(tmp_path / "table.md")
    assert [[row[name] for name in ("GPUs", "trials", "packs", "queues")] for row in rows] == [
        ["1", "2", "1", "1"],
        ["2", "4", "2", "2"],
    ]
    whole, trained = [float(row["s to the table"]) for row in rows], [float(row["s in training"]) for row in rows]
    assert all(0 < inner < outer for inner, outer in zip(trained, whole, strict=True))
    speeds = [3600 * trials / seconds for trials, seconds in zip((2, 4), whole, strict=True)]
    assert float(rows[1]["of n times the first"]) == pytest.approx(speeds[1] / speeds[0] / 2, abs=0.02)


@pytest.mark.end_to_end
@pytest.mark.xdist_group("benchmark-ended-script")
def test_a_terminated_script_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.grid_scaling", "--model", "tiny", "--device", "cpu", "--gpus", "1"]
    command += ["--trials", "2", "--steps", "100000", "--length", "32", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "platform", ROOT / "methods", ROOT)))}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as script:
        try:
            assert script.stdout is not None
            said = []
            for line in script.stdout:  # until its sweep trains: Ray and a worker are there
                said.append(line)
                if ": step " in line:
                    break
            started = psutil.Process(script.pid).children(recursive=True)
            assert "RayTrainWorker" in " ".join(process.name() for process in started), said
            script.terminate()
            time.sleep(0.001)
            script.terminate()
            assert script.wait(timeout=120) == 128 + signal.SIGTERM
            _, alive = psutil.wait_procs(started, timeout=60)
            assert not alive
        finally:
            script.kill()


@pytest.mark.end_to_end
@pytest.mark.xdist_group("benchmark-worker-loss")
def test_a_killed_worker_changes_no_bit_of_the_curves(tmp_path: Path) -> None:
    options = ["--workers", "2", "--steps", "60", "--length", "32", "--killed", "highest"]
    code, said = run_benchmark("worker_loss", *options, table=tmp_path / "table.md")
    assert code == 0, said
    before, struck = rows_of(tmp_path / "table.md")
    assert before["killed"] == "the run before"
    assert 20 <= int(struck["at step"]) < 60
    # 60 losses and gradients, and losses of evaluation before the first step and after three times twenty.
    assert int(struck["points compared"]) == 5 * (60 + 60 + 4)
    assert [struck[name] for name in ("missing", "doubled", "equal to the bit")] == ["0", "0", "yes"]
    assert float(struck["s from the kill until it trains again"]) > 0
    assert float(struck["more than undisturbed"]) > 0


class LargeTensors(TorchDispatchMode):
    """Within, notes dtype and device of all results larger than a vector."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[torch.dtype, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        large = (tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor) and tensor.numel() > 4096)
        self.seen |= {(tensor.dtype, tensor.device.type) for tensor in large}
        return result


def test_a_base_is_made_only_on_its_device_and_dtype() -> None:
    # 8 billion weights are 16 GB there, and would be 32 GB more in float32, in every worker.
    with LargeTensors() as tensors:
        random_base("tiny", torch.device("meta"), torch.bfloat16)
    assert tensors.seen == {(torch.bfloat16, "meta")}


@pytest.mark.parametrize(
    ("shapes", "num_tokens", "num_stacks", "graph", "compiled"),
    [
        ("llama-3.2-1b", 512, 1, 17.9, 12.4),
        ("llama-3.2-1b", 2048, 1, 41.5, 29.1),
        ("llama-3.2-1b", 8192, 1, 146.2, 100.9),
        ("llama-3.2-1b", 8192, 4, 187.9, 116.3),
        ("smollm2-135m", 2048, 1, 27.8, 16.8),
        ("smollm2-135m", 8192, 1, 60.3, 35.5),
        ("smollm2-135m", 16384, 1, 110.2, 59.3),
        ("smollm2-135m", 8192, 4, 112.2, 58.3),
        ("qwen3-0.6b", 2048, 1, 51.1, 26.8),
        ("qwen3-0.6b", 8192, 1, 167.5, 76.6),
        ("qwen3-0.6b", 8192, 4, 225.1, 103.0),
    ],
)
def test_the_cost_model_fits_the_steps_it_was_read_off(
    shapes: str, num_tokens: int, num_stacks: int, graph: float, compiled: float
) -> None:
    base = shapes_only(shapes, torch.bfloat16)
    features = features_of_step(adaptable_layers(base, base.get_output_embeddings()), num_tokens)
    choice = choose_mode("auto", num_steps=100_000, features_per_step=features, num_stacks=num_stacks)
    expected = float(choice.reason.split()[-2]) / 100  # milliseconds of a step
    assert 0.65 <= expected / (graph - compiled) <= 1.65
    assert choice.mode == "compiled"


def test_every_script_and_table_is_in_the_readme() -> None:
    folder = ROOT / "benchmarks"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.py"):
        if "\nif __name__" in path.read_text(encoding="utf-8") and path.stem != "sweeps":
            assert f"| `{path.stem}` |" in readme
            assert f"python -m benchmarks.{path.stem}" in readme
    for table in (folder / "results").iterdir():
        assert f"(results/{table.name})" in readme


def test_a_struck_pack_must_go_on_from_its_states(tmp_path: Path) -> None:
    def outcome(*after: str) -> Outcome:
        lines = [(20.0, "a", "training"), *((40.0 + index, "a", text) for index, text in enumerate(after))]
        return Outcome(tracking_uri="", name="", started=1000.0, seconds=90.0, lines=lines, table=[])

    strike = Strike(tmp_path, num_workers=2, num_members=5, at_step=20, which=HIGHEST)
    with pytest.raises(SweepFailedError, match="before a worker was killed; use more --steps"):
        check_strike(outcome("going on", "training"), strike, steps=60)
    strike.step, strike.time = 20, 1030.0
    assert check_strike(outcome("going on", "training"), strike, steps=60) == 11.0
    for after in ((), ("training",), ("going on",)):
        with pytest.raises(SweepFailedError, match="no other continued from the saved states"):
            check_strike(outcome(*after), strike, steps=60)


def test_curves_are_compared_point_by_point() -> None:
    norms = {("a", "train/grad_norm"): [(1, 3.0)]}
    theirs = {("a", "train/loss"): [(1, 2.0), (2, 4.0)], ("b", "train/loss"): [(1, 1.0)], **norms}
    same = compare(theirs, theirs)
    assert (same.num_points, same.is_whole, same.is_equal) == (4, True, True)
    other = compare({("a", "train/loss"): [(1, 2.0), (1, 2.0), (2, 5.0), (3, 1.0)], **norms}, theirs)
    assert other == Comparison(num_points=4, missing=1, doubled=2, losses=0.25, norms=0.0)
    close = compare(theirs | {("a", "train/grad_norm"): [(1, 3.003)]}, theirs)
    assert (close.is_whole, close.is_equal, close.losses) == (True, False, 0.0)
    assert close.norms == pytest.approx(1e-3)


@pytest.mark.heavy
def test_a_script_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    code, said = run_benchmark("data_parallel", "--workers", "3", table=tmp_path / "table.md")
    assert code == 2
    assert re.search(r"--workers: 3 workers cannot share 8 rows; allowed: 1, 2, 4, 8", said)
    for options, reason in {
        ("--modes", "graph"): "--modes: graph: nothing is captured on a CPU; allowed: eager",
        ("--workers", "1", "--strategies", "shard"): "--workers: 1: a sharded base needs several workers",
    }.items():
        code, said = run_benchmark("data_parallel", *options, table=tmp_path / "table.md")
        assert (code, reason in said) == (2, True), said
    assert not (tmp_path / "table.md").exists()


def test_solo_costs_are_measured_one_by_one_and_in_turns(tmp_path: Path) -> None:
    setting = Setting(model="tiny", mode="eager", num_rows=2, length=16, device=torch.device("cpu"), num_rounds=5)
    path = tmp_path / "table.md"
    compare_procedures(setting, 1, path)
    rows = rows_of(path)
    assert [row["shape"] for row in rows[: len(SHAPES)]] == list(SHAPES)
    assert [row["shape"] for row in rows[len(SHAPES) :]] == [
        "before: largest ratio",
        "now: largest ratio",
        "now: verdict",
    ]
    assert "pairs apart; the twins" in rows[-1]["before, each measurement"]
