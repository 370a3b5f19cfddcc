"""What is known of the time that packs take: what was calibrated, and what earlier sweeps in MLflow have shown."""

import json
import statistics
from collections.abc import Iterable, Mapping

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from loragrid.environment import hardware_tags
from loragrid.fingerprint import DEVICE_TAG
from loragrid.pack_timing import SHAPE_TAG, PackTiming, pack_shape, saved_timings
from loragrid.placement import Placement
from loragrid.planning import Plan
from loragrid.storage import local_folder
from loragrid.tracking import SWEEP_TAG, default_tracking_uri, quiet_store, sqlite_path
from loragrid.worker_environment import cpu_name


def device_of(tags: Mapping[str, str]) -> str:
    """What a worker with these tags computes on: times of one do not hold for another."""
    return f"{tags.get(DEVICE_TAG, '')}, {tags.get('loragrid.threads', '')} threads"


def known_timings(plan: Plan, placement: Placement) -> dict[str, PackTiming]:
    """Timings of the plan's shapes on this machine: calibrated ones first, else those of recorded sweeps."""
    shapes = {pack_shape(pack.trials, placement.num_workers) for pack in plan.packs}
    experiment, device = plan.experiment, device_here(placement)
    known = {key: timing for key, timing in saved_timings(local_folder(experiment), device).items() if key in shapes}
    try:
        uri = default_tracking_uri(experiment.storage.path, experiment.tracking.uri)
        return recorded_timings(uri, device, shapes - known.keys()) | known
    except (MlflowException, ValueError):  # a store that is away, or of another kind, has nothing to tell
        return known


def device_here(placement: Placement) -> str:
    """What a worker here computes on; `nvidia-smi` is asked, for torch would open a context on the GPU."""
    name = hardware_tags().get("loragrid.gpu", "").partition(" × ")[2].partition(",")[0] if placement.use_gpu else ""
    return device_of({DEVICE_TAG: name or cpu_name(), "loragrid.threads": str(placement.threads)})


def recorded_timings(tracking_uri: str, device: str, shapes: Iterable[str]) -> dict[str, PackTiming]:
    """What finished trials of packs of these shapes have shown on this device (as `device_of` names it), by shape."""
    path = sqlite_path(tracking_uri)
    if path is not None and not path.exists():
        return {}
    found: dict[str, PackTiming] = {}
    with quiet_store():
        client = MlflowClient(tracking_uri=tracking_uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for shape in dict.fromkeys(shapes):
            condition = f"tags.`{SHAPE_TAG}` = '{shape}' and attributes.status = 'FINISHED'"
            runs = client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"], max_results=100)
            runs_here = [run for run in runs if device_of(run.data.tags) == device]
            timings = [timing for run in runs_here if (timing := _recorded(run)) is not None]
            if timings:
                middle = statistics.median(timing.step for timing in timings)
                found[shape] = min(timings, key=lambda timing: abs(timing.step - middle))
    return found


def _recorded(run: Run) -> PackTiming | None:
    """What a trial's run tells of its pack; compiling and start-up are spread over the steps."""
    metrics, parameters = run.data.metrics, run.data.params
    try:
        steps, every = int(parameters["training.steps"]), json.loads(parameters.get("training.eval_every", "null"))
        evaluations = (steps // every if every else 0) + (0 if every and steps % every == 0 else 1)
        return PackTiming(
            source=f"sweep {run.data.tags.get(SWEEP_TAG, '')}",
            setup=metrics["time/setup_seconds"],
            measure=metrics.get("time/measure_seconds", 0.0),
            step=(metrics["time/train_seconds"] + metrics.get("time/data_seconds", 0.0)) / steps,
            evaluation=metrics["time/eval_seconds"] / evaluations,
        )
    except KeyError:
        return None
