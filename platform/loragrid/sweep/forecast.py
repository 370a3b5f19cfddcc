"""Predicts the time of a sweep on this machine from earlier timings, and from a calibration if requested."""

import os
from collections.abc import Mapping

import torch
from rich.console import Console

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.config.local_path import local_path
from loragrid.data.dataset import TokenizedData
from loragrid.formatting import count_of
from loragrid.planning.placement import Placement
from loragrid.planning.plan import Plan
from loragrid.planning.time_estimate import TimeEstimate, estimate_time, local_node, plan_on
from loragrid.training.determinism import compute_deterministically, name_missing_kernel

CALIBRATION_SECONDS = 120.0


def forecast(
    plan: Plan,
    console: Console,
    rows: Mapping[tuple[ModelConfig, DataConfig], TokenizedData] | None = None,
    *,
    budget_seconds: float = CALIBRATION_SECONDS,
) -> tuple[Plan, TimeEstimate]:
    """The plan with its packs cut for this machine, and the time it is expected to take here.

    rows: the plan's rows, on which a calibration first times some steps; None: only earlier timings are used.

    Raises:
        ValueError: a calibration was requested, but one process cannot perform it.
    """
    plan, placement = plan_on(plan, local_node())
    if rows is not None:
        calibrate_here(plan, placement, console, rows, budget_seconds)
    if not _may_have_timings(plan):
        return plan, estimate_time(plan, placement, {})
    from loragrid.sweep.timing_history import known_timings, recorded_start  # takes seconds: imports Ray

    return plan, estimate_time(plan, placement, known_timings(plan, placement), recorded_start(plan))


def _may_have_timings(plan: Plan) -> bool:
    """Whether earlier timings may exist: MLflow or the storage is elsewhere, or the storage folder exists."""
    experiment = plan.experiment
    elsewhere = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "://" in experiment.storage.path
    return bool(elsewhere) or local_path("storage.path", experiment.storage.path, to_be_written=True).is_dir()


def too_large(plan: Plan, memory_bytes: int) -> list[str]:
    """One line for each of the plan's largest packs that needs more memory than a GPU with `memory_bytes` has."""
    found = []
    for pack in [pack for phase in plan.phases for pack in phase.largest_packs()]:
        estimate = plan.gpu_memory(pack)
        if estimate is not None and estimate.total > memory_bytes:
            end = "its trials will fail" if len(pack.trials) == 1 else "it will be halved until its parts do"
            found.append(
                f"{pack.pack_id} ({count_of(len(pack.trials), 'trial')}) does not fit: about "
                f"{estimate.total / 2**30:.1f} GiB of {memory_bytes / 2**30:.1f}; {end}"
            )
    return found


def gpu_memory_here() -> int | None:
    """Memory of this machine's first GPU in bytes; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def calibrate_here(
    plan: Plan,
    placement: Placement,
    console: Console,
    rows: Mapping[tuple[ModelConfig, DataConfig], TokenizedData],
    budget_seconds: float,
) -> None:
    """Time the plan's packs with one worker of this machine, and save the timings in the storage folder.

    Raises:
        ValueError: a pack needs several workers or does not fit on this machine, or a deterministic kernel is missing.
    """
    if placement.num_workers > 1:
        raise ValueError(
            f"--calibrate: workers.num_workers: {placement.num_workers}: a calibration is one process, which cannot "
            "measure how long workers wait for each other; allowed: --set workers.num_workers=1, or no --calibrate"
        )
    if not placement.num_packs:
        raise ValueError("--calibrate: no pack fits on this machine (workers: more CPUs or GPUs than it has)")

    from loragrid.planning.timing import save_timings
    from loragrid.sweep.calibration import calibrate  # imports MLflow and Ray; other plans need neither
    from loragrid.sweep.storage import local_folder
    from loragrid.sweep.timing_history import device_here

    def say(sentence: str) -> None:
        console.print(sentence, style="dim", highlight=False, markup=False)

    torch.set_num_threads(placement.threads)
    if plan.experiment.engine.deterministic:
        compute_deterministically()
    try:
        timings = calibrate(
            [pack for phase in plan.phases for pack in phase.packs],
            rows,
            torch.device("cuda" if placement.use_gpu else "cpu"),
            engine=plan.experiment.engine,
            budget_seconds=budget_seconds,
            say=say,
        )
    except RuntimeError as error:
        if (reason := name_missing_kernel(str(error))) != str(error):
            raise ValueError(reason) from None
        raise
    save_timings(local_folder(plan.experiment), device_here(placement), timings)
