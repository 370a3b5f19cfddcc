"""Runs one queue on Ray: a `TorchTrainer` inside a Tune trial, reporting back to Tune."""

import os
import threading
from typing import Any

import ray
from ray import tune
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.queue import Empty, Queue

from loragrid.config.experiment import EarlyStoppingConfig, EngineConfig
from loragrid.planning.placement import Placement
from loragrid.trials.packing import PackQueue
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import RowsByConfig, WorkerTask

# A worker waits until its report was fetched; Ray's own two seconds would be longer than most packs' steps.
FETCH_REPORTS_EVERY_SECONDS = "0.1"
REPORT_TIMEOUT_SECONDS = 1.0


def drive_queue(
    queue: PackQueue,
    rows: RowsByConfig,
    placement: Placement,
    storage_path: str,
    store: TrialStore,
    *,
    max_failures: int = 0,
    engine: EngineConfig,
    early_stopping: EarlyStoppingConfig | None = None,
    by_tune: bool = False,
) -> None:
    """Train the queue's packs to their ends; their updates reach Tune one by one.

    Workers that die are replaced, wherever there is room; the new ones go on from what `store` holds. With `by_tune`
    that is left to Tune. Must be called in a Tune trial.

    Raises:
        TrainingFailedError: the workers failed too often, or raised where failures cannot stay a trial's own.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", FETCH_REPORTS_EVERY_SECONDS)
    _tell_address_to_cleaner()
    resources = {"CPU": placement.cpus_per_worker}
    if placement.use_gpu:
        resources["GPU"] = 1.0
    task = WorkerTask(
        queue=queue,
        rows=rows,
        store=store,
        threads=placement.threads,
        engine=engine,
        early_stopping=early_stopping,
        by_tune=by_tune,
        shard=placement.shard,
    )
    reports = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers, use_gpu=placement.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if placement.use_gpu else "gloo"),
        run_config=RunConfig(
            name=queue.queue_id,
            storage_path=storage_path,
            # Where Tune may stop the queue, it is Tune that tries again: Train's controller would take a stop for a
            # failure of its workers, reserve resources for new ones, and be gone before anybody knew of these.
            failure_config=FailureConfig(max_failures=0 if by_tune else max_failures),
            # mypy sees Ray Train's first version.
            callbacks=[_Forward(reports), _FreePlaces()],  # type: ignore[list-item]
        ),
    )
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


class _Forward(UserCallback):
    """Puts what worker 0 reports into a queue, for the Tune trial to report it in its own name.

    Ray's `TuneReportCallback` does so from another thread than the trial's. Where that one ends while a report is on
    its way, both wait for each other for ever (Ray 2.60, seen on a busy machine).
    """

    def __init__(self, reports: Queue) -> None:
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """As Ray Train calls it, in its controller."""
        self._reports.put(metrics[0])


class _FreePlaces(WorkerGroupCallback, ControllerCallback):
    """Gives back the CPUs and GPUs of a queue's workers when its controller ends, whatever went wrong on the way.

    Train's own controller ends its workers first, and gives nothing back where that fails: where Ray has killed the
    small processes beside them too, as it does on a machine short of memory. They would then be held until the whole
    program ends, and the next queue would wait for ever (Ray 2.60, whose users may add to its own callbacks so).
    """

    def __init__(self) -> None:
        self._held: list[Any] = []

    def after_worker_group_start(self, worker_group: Any) -> None:
        """As Ray Train calls it, in its controller."""
        self._held.append(worker_group.get_worker_group_state().placement_group_handle)

    async def before_controller_shutdown(self) -> None:
        """As Ray Train calls it, in its controller; what is given back already stays so."""
        while self._held:
            self._held.pop().shutdown()


def _tell_address_to_cleaner() -> None:
    """Let Train's own cleaner find this cluster, or a stopped queue keeps its CPUs and GPUs.

    It frees them once the queue's controller is gone, and asks for that at the address that the last `ray start` on
    this machine wrote down: not this cluster, where there are two of them or where that one was killed. Ray 2.60 has no
    setting for it; what stands in this set reaches the controller, and from there the cleaner.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def _work(config: dict[str, WorkerTask]) -> None:
    # Imported here, in the worker: the Tune trial and Train's controller hold this function too, and would pay the
    # seconds and the memory that importing the models takes.
    from loragrid.worker.main import run_worker

    run_worker(config["task"])
