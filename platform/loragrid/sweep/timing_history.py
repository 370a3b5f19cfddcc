"""Collects known timings of packs: from calibrations, and from earlier sweeps in MLflow."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from loragrid.planning.placement import Placement
from loragrid.planning.plan import Plan
from loragrid.planning.timing import SHAPE_TAG, PackTiming, cost_shape, num_evaluations, pack_shape, saved_timings
from loragrid.sweep.storage import local_folder
from loragrid.sweep.summary import START_METRIC
from loragrid.tracking.mlflow_internals import quiet_store
from loragrid.tracking.store_uri import default_tracking_uri, sqlite_path
from loragrid.training.step_mode import MODE_TAG
from loragrid.trials.tags import DEVICE_TAG, KIND_TAG, SWEEP_TAG
from loragrid.worker.environment import hardware_tags
from loragrid.worker.worker_tags import cpu_name


def device_of(tags: Mapping[str, str]) -> str:
    """The device of a worker with these tags; a timing is valid only on the device it was measured on."""
    return f"{tags.get(DEVICE_TAG, '')}, {tags.get('loragrid.threads', '')} threads"


def known_timings(plan: Plan, placement: Placement) -> dict[str, PackTiming]:
    """Pack shape -> timing on this machine; shapes of the plan without one are missing.

    A timing in the step mode that the plan expects is preferred, and among such timings the calibrated one. A timing in
    another mode is better than none, because a plan knows neither the real length of the rows, by which "auto" decides,
    nor whether a capture will fail.
    """
    experiment, device = plan.experiment, device_here(placement)
    shapes = {
        pack_shape(pack.trials, experiment.engine, placement.num_workers, shard=placement.shard): PackKind(
            num_members=len(pack.trials),
            num_shapes=len({cost_shape(trial) for trial in pack.trials}),
            mode=plan.gpu_engine(pack).mode if placement.use_gpu else "eager",
        )
        for phase in plan.phases
        for pack in phase.packs
    }
    known = {key: timing for key, timing in saved_timings(local_folder(experiment), device).items() if key in shapes}
    as_expected = {key for key, timing in known.items() if timing.problem or timing.mode == shapes[key].mode}
    try:
        uri = default_tracking_uri(experiment.storage.path, experiment.tracking.uri)
        recorded = recorded_timings(uri, device, {key: kind for key, kind in shapes.items() if key not in as_expected})
        better = {key for key, timing in recorded.items() if key not in known or timing.mode == shapes[key].mode}
        return known | {key: recorded[key] for key in better}
    except (MlflowException, ValueError):  # the store does not answer, or is of another kind
        return known


def device_here(placement: Placement) -> str:
    """The device of a worker on this machine. `nvidia-smi` names the GPU, because torch would open a context on it."""
    name = hardware_tags().get("loragrid.gpu", "").partition(" × ")[2].partition(",")[0] if placement.use_gpu else ""
    return device_of({DEVICE_TAG: name or cpu_name(), "loragrid.threads": str(placement.threads)})


def recorded_start(plan: Plan) -> float | None:
    """Seconds from a queue's start to its workers' first report in the latest sweep of the store; None if unknown.

    Ray, the workers' processes and their imports take this time; it hardly depends on what is trained.
    """
    try:
        uri = default_tracking_uri(plan.experiment.storage.path, plan.experiment.tracking.uri)
        path = sqlite_path(uri)
        if path is not None and not path.exists():
            return None
        with quiet_store():
            client = MlflowClient(tracking_uri=uri)
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
            condition = f"tags.`{KIND_TAG}` = 'sweep' and metrics.`{START_METRIC}` > 0"
            runs = client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"], max_results=1)
        return runs[0].data.metrics[START_METRIC] if runs else None
    except (MlflowException, ValueError):  # as above
        return None


@dataclass(frozen=True, kw_only=True)
class PackKind:
    """What all packs of a shape have in common.

    num_shapes: the number of trials that are measured, because the others have the same shape as one of them. mode:
    expected for the steps.
    """

    num_members: int
    num_shapes: int
    mode: str


def recorded_timings(tracking_uri: str, device: str, shapes: Mapping[str, PackKind]) -> dict[str, PackTiming]:
    """Pack shape -> timing from finished trials on this device (as `device_of` names it).

    Trials whose steps ran in the shape's mode are preferred. Of several timings, the one with the median step counts.
    """
    path = sqlite_path(tracking_uri)
    if path is not None and not path.exists():
        return {}
    found: dict[str, PackTiming] = {}
    with quiet_store():
        client = MlflowClient(tracking_uri=tracking_uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for shape, kind in shapes.items():
            condition = f"tags.`{SHAPE_TAG}` = '{shape}' and attributes.status = 'FINISHED'"
            runs = client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"], max_results=100)
            runs_here = [run for run in runs if device_of(run.data.tags) == device]
            timings = [timing for run in runs_here if (timing := _recorded(run, kind)) is not None]
            timings = [timing for timing in timings if timing.mode == kind.mode] or timings
            if timings:
                middle = statistics.median(timing.step for timing in timings)
                found[shape] = min(timings, key=lambda timing: abs(timing.step - middle))
    return found


def _recorded(run: Run, kind: PackKind) -> PackTiming | None:
    """The timing of a trial's pack, read from the trial's run; None if a metric or parameter is missing.

    Start-up costs other than compiling are spread over the steps. The first pack of a queue measures the shapes of all
    its packs. What measuring this pack costs therefore follows from the time that this trial's shape took.
    """
    metrics, parameters = run.data.metrics, run.data.params
    try:
        steps, every = int(parameters["training.steps"]), json.loads(parameters.get("training.eval_every", "null"))
        tests = int(parameters.get("data.num_test", "0")) / int(parameters["data.num_eval"])
        return PackTiming(
            source=f"sweep {run.data.tags.get(SWEEP_TAG, '')}",
            mode=run.data.tags.get(MODE_TAG, "eager"),
            setup=metrics["time/setup_seconds"],
            measure=_measuring(metrics, kind),
            startup=metrics.get("time/compile_seconds", 0.0),
            step=sum(metrics.get(f"time/{phase}_seconds", 0.0) for phase in ("train", "data", "check")) / steps,
            evaluation=metrics["time/eval_seconds"] / num_evaluations(steps, every, kind.num_members, tests),
        )
    except KeyError:
        return None


def _measuring(metrics: Mapping[str, float], kind: PackKind) -> float:
    """Seconds of the solo measurements of a pack; a store from before shapes took turns has them as recorded."""
    own = metrics.get("time/measure_shape_seconds")
    return metrics.get("time/measure_seconds", 0.0) if own is None else kind.num_shapes * own
