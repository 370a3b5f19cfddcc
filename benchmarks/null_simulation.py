"""How often does the verdict claim a difference that is not there? Whole sweeps through the product's functions.

    python -m benchmarks.null_simulation --replications 5000 --out benchmarks/results/null_simulation.md

Every replication draws a grid (methods x learning rates x seeds), lets `selection.choose` choose on evaluation figures,
draws test scores of the chosen settings, and lets `pairwise.compare_methods` judge. `null_scenes` lists the scenes. It
needs numpy, scipy, pandas and pydantic, no GPU, no Ray and no MLflow. The exit code is 1 if a scene breaks a criterion.
"""

import argparse
import csv
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import scipy
from scipy import special

from benchmarks.null_replication import SHIFTS, Tally, replicate_all
from benchmarks.null_scenes import SCENES, Scene

PER_TASK = 100
LARGEST_FALSE, LARGEST_FALSE_AT_LIMIT = 0.05, 0.11
LOWEST_MEAN_COVERAGE, LOWEST_JOINT_COVERAGE = 0.93, 0.90
TAIL = 0.005
"""Each side of a 99 % interval."""
COLUMNS = (
    "scene",
    "false claims",
    "99 % limits",
    "coverage: mean",
    "worst pair",
    "simultaneous: worst pair",
    "all at once",
    "own interval",
    "behind the best",
    "power at " + " / ".join(f"{shift:g}" for shift in SHIFTS),
    "refused",
    "of the tests alone",
    "with a caveat",
)


def clopper_pearson(count: int, num: int) -> tuple[float, float]:
    """The exact 99 % limits of a probability, of which `count` of `num` replications were seen."""
    low = float(special.betaincinv(count, num - count + 1, TAIL)) if count else 0.0
    high = float(special.betaincinv(count + 1, num - count, 1 - TAIL)) if count < num else 1.0
    return low, high


def faults(scene: Scene, tally: Tally) -> list[str]:
    """The criteria that the scene breaks beyond what chance explains, in words."""
    judged = tally.num - tally.refused
    if not judged:
        return []
    found = []
    largest = LARGEST_FALSE_AT_LIMIT if scene.limit else LARGEST_FALSE
    if clopper_pearson(tally.false, judged)[0] > largest:
        found.append(f"false claims in {tally.false / judged:.3f}, surely more than {largest}")
    # The coverages of pairs are not independent, so their mean is taken as one probability: the widest limits.
    covered = round(float(tally.alone.mean()) - tally.refused)
    if clopper_pearson(covered, judged)[1] < LOWEST_MEAN_COVERAGE:
        found.append(f"intervals of one pair cover {covered / judged:.3f}, surely less than {LOWEST_MEAN_COVERAGE}")
    joint = tally.joint - tally.refused
    if clopper_pearson(joint, judged)[1] < LOWEST_JOINT_COVERAGE:
        found.append(f"all intervals cover in {joint / judged:.3f}, surely less than {LOWEST_JOINT_COVERAGE}")
    return found


def simulate(scenes: Sequence[Scene], replications: int, processes: int) -> Iterator[tuple[Scene, Tally]]:
    """Every scene with its sum, as soon as it is complete. The sums do not depend on the number of processes."""
    tasks = [
        (scene, start, min(start + PER_TASK, replications))
        for scene in scenes
        for start in range(0, replications, PER_TASK)
    ]
    missing = {scene.name: -(-replications // PER_TASK) for scene in scenes}
    totals = {scene.name: Tally() for scene in scenes}
    if processes == 1:
        for scene in scenes:
            yield scene, replicate_all(scene, 0, replications)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that start below
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(replicate_all, *task): task[0] for task in tasks}
        for future in as_completed(running):
            scene = running[future]
            totals[scene.name] = totals[scene.name] + future.result()
            missing[scene.name] -= 1
            if not missing[scene.name]:
                yield scene, totals[scene.name]


def row_of(scene: Scene, tally: Tally) -> list[str]:
    """The cells of `COLUMNS`. Refused sweeps count only in their own column."""
    judged, refused = tally.num - tally.refused, tally.refused
    name = scene.name + (" *" if scene.limit else "")
    if not judged:
        return [name, *["–"] * (len(COLUMNS) - 4), "1.000", "–", "–"]
    low, high = clopper_pearson(tally.false, judged)
    shares = [
        (float(value) - refused) / judged
        for value in (tally.alone.mean(), tally.alone.min(), tally.together.min(), tally.joint)
    ]
    return [
        name,
        f"{tally.false / judged:.4f}",
        f"{low:.3f} to {high:.3f}",
        *(f"{share:.3f}" for share in shares),
        f"{(tally.own - refused) / judged:.3f}",
        f"{(tally.bounds - refused) / judged:.3f}",
        " / ".join(f"{power / tally.shifted:.2f}" for power in tally.power),
        f"{refused / tally.num:.3f}",
        f"{tally.tested / judged:.4f}",
        f"{tally.warned} of {tally.false}",
    ]


def machine() -> str:
    libraries = {"Python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    versions = ", ".join(f"{name} {version}" for name, version in {**libraries, "pandas": pd.__version__}.items())
    return f"{os.cpu_count()} cores ({platform.machine()}); {versions}"


def markdown(results: Sequence[tuple[Scene, Tally]], command: str, seconds: float) -> str:
    """The page of results."""
    broken = [f"* {scene.name}: {fault}." for scene, tally in results for fault in faults(scene, tally)]
    replications = max(tally.num for _, tally in results)
    rows = [row_of(scene, tally) for scene, tally in results]
    lines = [
        "# The verdict when nothing differs",
        "",
        f"{len(results)} scenes, {replications:,} simulated sweeps each. Each sweep goes through the product's own",
        "functions: a grid, the choice on evaluation figures, scores of test rows, the judgement.",
        "[verdict.md](../../docs/verdict.md) explains the columns.",
        "",
        f"* Command: `{command}`",
        f"* Machine: {machine()}; {seconds:.0f} s.",
        "* A scene marked * shows a stated limit of the procedure.",
        "",
        "Criteria: " + (f"all {len(results)} scenes pass." if not broken else "broken:"),
        *broken,
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def write_csv(path: Path, results: Sequence[tuple[Scene, Tally]]) -> None:
    """All sums, and the coverage of every pair."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [name for name, value in vars(Tally()).items() if not isinstance(value, np.ndarray)]
        writer.writerow(["scene", "limit", *names, "power", "alone", "together"])
        for scene, tally in results:
            arrays = [" ".join(f"{value:g}" for value in array) for array in (tally.power, tally.alone, tally.together)]
            writer.writerow([scene.name, scene.limit, *(f"{getattr(tally, name):g}" for name in names), *arrays])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=5000, help="simulated sweeps per scene")
    parser.add_argument(
        "--scenes", nargs="+", default=[], help="words that the scene's name contains; default: all scenes"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=None, help="Markdown file; a .csv file is written beside it")
    options = parser.parse_args(arguments)
    wanted = [scene for scene in SCENES if all(word in scene.name for word in options.scenes)]
    if not wanted:
        parser.error(
            f"no scene contains {' '.join(options.scenes)}; there: {', '.join(scene.name for scene in SCENES)}"
        )
    start = time.monotonic()
    done: dict[str, Tally] = {}
    for scene, tally in simulate(wanted, options.replications, options.processes):
        done[scene.name] = tally
        print(" | ".join(row_of(scene, tally)), *faults(scene, tally), sep=" | ", flush=True)
    results = [(scene, done[scene.name]) for scene in wanted]
    command = "python -m benchmarks.null_simulation " + " ".join(sys.argv[1:] if arguments is None else arguments)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(markdown(results, command.strip(), time.monotonic() - start), encoding="utf-8")
        write_csv(options.out.with_suffix(".csv"), results)
    broken = [scene.name for scene, tally in results if faults(scene, tally)]
    print(f"{time.monotonic() - start:.0f} s; criteria broken in {len(broken)} of {len(results)} scenes:", *broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
