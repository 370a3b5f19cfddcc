"""Runs one queue on Ray: starts a `TorchTrainer` inside a Tune trial and passes its reports on to Tune."""

import threading
from typing import Any

from ray import tune
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from loragrid.planning.placement import Placement
from loragrid.sweep.ray_internals import fetch_reports_often, placement_release, send_address_to_controller
from loragrid.worker.messages import WorkerTask

REPORT_TIMEOUT_SECONDS = 1.0


def drive_queue(task: WorkerTask, placement: Placement, storage_path: str, *, max_failures: int = 0) -> None:
    """Train all packs of the task's queue and report their updates to Tune one by one.

    Dead workers are replaced, up to `max_failures` times, on any node with room. The new workers continue from the
    states in the task's store. With `task.by_tune`, Tune itself retries. Must be called in a Tune trial.

    Raises:
        TrainingFailedError: the workers failed too often, or a failure affected more than single trials.
    """
    fetch_reports_often()
    send_address_to_controller()
    reports = Queue(actor_options={"num_cpus": 0})
    trainer = _make_trainer(task, placement, storage_path, max_failures, reports)
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    training = threading.Thread(target=fit, daemon=True)
    training.start()
    while training.is_alive() or not reports.empty():
        try:
            tune.report(reports.get(timeout=REPORT_TIMEOUT_SECONDS))
        except Empty:
            continue
    if failures:
        raise failures[0]


def _make_trainer(
    task: WorkerTask, placement: Placement, storage_path: str, max_failures: int, reports: Queue
) -> TorchTrainer:
    resources = {"CPU": placement.cpus_per_worker}
    if placement.use_gpu:
        resources["GPU"] = 1.0
    return TorchTrainer(
        _work,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers, use_gpu=placement.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if placement.use_gpu else "gloo"),
        run_config=RunConfig(
            name=task.queue.queue_id,
            storage_path=storage_path,
            # If Tune may stop the queue, Tune also retries it. Train's controller would mistake a stop for a failure of
            # its workers, reserve resources for new ones, and end before anything could release them.
            failure_config=FailureConfig(max_failures=0 if task.by_tune else max_failures),
            # mypy reads the types of Ray Train's first version.
            callbacks=[_ReportForwarder(reports), placement_release()],  # type: ignore[list-item]
        ),
    )


class _ReportForwarder(UserCallback):
    """Puts the reports of worker 0 into a queue; the Tune trial takes them from there and reports them itself.

    Ray's `TuneReportCallback` reports from a thread other than the trial's. If the trial ends while a report is on its
    way, the two threads wait for each other forever (Ray 2.60, seen on a busy machine).
    """

    def __init__(self, reports: Queue) -> None:
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train in its controller."""
        self._reports.put(metrics[0])


def _work(config: dict[str, WorkerTask]) -> None:
    # Imported here, so that only the worker imports the models, which takes seconds and memory. The Tune trial and
    # Train's controller load this function too.
    from loragrid.worker.main import run_worker

    run_worker(config["task"])
