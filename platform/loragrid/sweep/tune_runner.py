"""Runs queues as Tune trials, as many at once as the cluster holds; packs that a failed queue left run again."""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.train import TrainingFailedError
from ray.tune.schedulers import ASHAScheduler

from loragrid.config.experiment import Experiment
from loragrid.planning.placement import Placement
from loragrid.planning.plan import Plan
from loragrid.sweep.callback import RecordingCallback
from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.queue_failure import describe_failure
from loragrid.sweep.ray_processes import own_ray_processes
from loragrid.sweep.ray_trainer import drive_queue
from loragrid.sweep.signals import SweepInterrupted, ended_by_signals
from loragrid.sweep.storage import below
from loragrid.sweep.summary import SweepCost
from loragrid.tracking.previous_run import PreviousSweep
from loragrid.tracking.recorder import Recorder
from loragrid.trials.expand import expand
from loragrid.trials.outcome import SweepOutcome
from loragrid.trials.packing import Pack, PackQueue, assign_queues
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.environment import environment_tags
from loragrid.worker.messages import QueueFailure, RowsByConfig

# What a Tune trial's process was seen to hold: Ray, torch and transformers imported, nothing loaded.
TUNE_TRIAL_BYTES = 500 * 2**20
# How often the process that drives a queue may be lost, mostly with its node, before the queue is given up.
MAX_LOST_DRIVERS = 3
# No way is known to come to this; a sweep that came to it must not pass for a finished one.
NEVER_BEGUN = QueueFailure(reason="Ray Tune has ended without starting a process for this trial", traceback="")


class TuneRunner:
    """Assigns the plan's packs to queues and tunes over those; packs that a failed queue had not begun come again."""

    def __init__(
        self,
        the_plan: Plan,
        rows: RowsByConfig,
        placement: Placement,
        recorder: Recorder,
        store: TrialStore,
        name: str,
        storage: str,
        progress: SweepProgress,
        previous: PreviousSweep | None = None,
    ) -> None:
        self.plan, self.rows, self.placement = the_plan, rows, placement
        self.storage, self.name, self.store = storage, name, store
        # Tune and Train would take up what lies under an equal name, and they know nothing of changed packs.
        self.tune_name = name if previous is None else f"{name}.resumed-{previous.num_resumed + 1}"
        self.queues: dict[str, PackQueue] = {}
        self.callback = RecordingCallback(
            recorder,
            store,
            lambda config, _: self.queues[config["queue"]],
            environment_tags(),
            progress,
            several_runs=True,
            previous=previous,
            cost=SweepCost(placement.num_workers if placement.use_gpu else 0),
        )

    def run(self) -> SweepOutcome:
        """Every pack to its end; a queue that fails has begun at least one, so that the rounds come to an end.

        Raises:
            SweepInterrupted: SIGINT or SIGTERM has come; what was open is recorded as KILLED.
        """
        own_ray = own_ray_processes()
        with ended_by_signals(own_ray) as signals:
            try:
                self._run_all(signals)
            except KeyboardInterrupt:
                if not signals:
                    raise
            finally:
                own_ray.clear()  # what is recorded from here on needs no Ray
                self.callback.close(trial.trial_id for trial in self.plan.trials)
        if signals:
            raise SweepInterrupted(self.name, signals[0])
        return self.callback.outcome

    def _run_all(self, signals: Sequence[int]) -> None:
        waiting: list[Pack] = list(self.plan.packs)
        for number in itertools.count():
            queues = assign_queues(waiting, self._num_queues(len(waiting)), first=len(self.queues))
            self.queues |= {queue.queue_id: queue for queue in queues}
            self._tune(queues, number)
            if signals:
                return
            waiting = self.callback.left_by_failed_queues()
            if not waiting:
                break
        self.callback.fail_unbegun(self.plan.packs, NEVER_BEGUN)

    def _num_queues(self, num_packs: int) -> int:
        """As many queues as the cluster has places; one per pack where a pack must not wait for another's workers.

        Trials that must train alone want processes of their own, several workers cannot go on after one's failure, and
        a cluster without a place yet will grow by nobody knows how many.
        """
        alone = self.plan.experiment.pack.max_members == 1 or self.placement.num_workers > 1
        return num_packs if alone else self.placement.num_packs or num_packs

    def _tune(self, queues: Sequence[PackQueue], number: int) -> None:
        experiment, placement, storage = self.plan.experiment, self.placement, below(self.storage, self.tune_name)
        store = self.store
        early_stopping = experiment.early_stopping
        by_tune = early_stopping is not None and experiment.pack.max_members == 1

        def train_queue(config: dict[str, Any], queues: Mapping[str, PackQueue], rows: RowsByConfig) -> None:
            try:
                drive_queue(
                    queues[config["queue"]],
                    rows,
                    placement,
                    storage,
                    store,
                    max_failures=experiment.workers.max_failures,
                    engine=experiment.engine,
                    early_stopping=early_stopping,
                    by_tune=by_tune,
                )
            except TrainingFailedError as error:
                if by_tune:
                    raise
                # Said, not raised: what Tune sees raised it tries again, as it should where a whole node was lost.
                tune.report({"failure": describe_failure(error)})

        name = self.tune_name if number == 0 else f"{self.tune_name}.{number}"
        with quiet_tune():
            tune.Tuner(
                lightweight(
                    tune.with_parameters(
                        train_queue, queues={queue.queue_id: queue for queue in queues}, rows=self.rows
                    )
                ),
                param_space={"queue": tune.grid_search([queue.queue_id for queue in queues])},
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=max(1, placement.num_packs),
                    scheduler=asha(experiment) if by_tune else None,
                ),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=self.storage,
                    callbacks=[self.callback],
                    failure_config=tune.FailureConfig(
                        max_failures=experiment.workers.max_failures if by_tune else MAX_LOST_DRIVERS
                    ),
                    verbose=0,
                ),
            ).fit()


def asha(experiment: Experiment) -> ASHAScheduler:
    """`early_stopping` for trials that train alone: Tune compares each with all that have been at the same rung."""
    config = experiment.early_stopping
    assert config is not None
    return ASHAScheduler(
        time_attr="step",
        metric={"eval/loss": "eval_loss", "train/loss": "train_loss"}[config.metric],
        mode="min",
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
        max_t=max(trial.training.steps for trial in expand(experiment)),
    )


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Within, Tune writes no result files, tables and tracebacks: MLflow and the live display take their place."""
    switches = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    before = {name: os.environ.get(name) for name in switches}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(switches)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def lightweight(trainable: Any) -> Any:
    """A Tune trial that takes no CPU: it only waits for its `TorchTrainer`, whose workers bring their own resources.

    One that held a CPU could keep its own workers from ever being placed. Tune refuses a trial that takes nothing, so
    it takes the memory that its process uses.
    """
    return tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": TUNE_TRIAL_BYTES}]))
