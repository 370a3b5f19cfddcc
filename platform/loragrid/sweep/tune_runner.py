"""Runs queues as Tune trials, as many at once as the cluster holds; packs left by failed queues run again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.train import TrainingFailedError

from loragrid.config.experiment import Experiment
from loragrid.planning.placement import Placement
from loragrid.planning.plan import Plan
from loragrid.planning.queues import queues_on
from loragrid.sweep.callback import RecordingCallback
from loragrid.sweep.confirmation import Confirmation
from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.queue_failure import describe_failure
from loragrid.sweep.ray_internals import quiet_tune
from loragrid.sweep.ray_processes import own_ray_processes
from loragrid.sweep.ray_trainer import drive_queue
from loragrid.sweep.record import Sweep
from loragrid.sweep.resume import mark_diverged_before
from loragrid.sweep.signals import SweepInterrupted, ended_by_signals, stop_handler_kept
from loragrid.sweep.storage import below, storage_uri
from loragrid.sweep.summary import SweepCost
from loragrid.trials.outcome import SweepOutcome
from loragrid.trials.packing import PackQueue
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.environment import environment_tags
from loragrid.worker.messages import QueueFailure, RowsByConfig, WorkerTask

# Measured memory of a Tune trial's process: Ray, torch and transformers imported, nothing loaded.
TUNE_TRIAL_BYTES = 500 * 2**20
# How often the process that drives a queue may be lost, mostly with its node, before the queue is given up.
MAX_LOST_DRIVERS = 3
# No case is known in which this happens. If it does, the sweep must not look finished.
NEVER_BEGUN = QueueFailure(reason="Ray Tune has ended without starting a process for this trial", traceback="")


class TuneRunner:
    """Assigns a plan's packs to queues and trains them with Tune; packs left by failed queues are assigned again.

    the_plan: the trials of the sweep that are to be trained now. rows: references to the tokenised rows.
    """

    def __init__(
        self, sweep: Sweep, the_plan: Plan, rows: RowsByConfig, placement: Placement, progress: SweepProgress
    ) -> None:
        self.sweep, self.plan, self.rows, self.placement = sweep, the_plan, rows, placement
        self.queues: dict[str, PackQueue] = {}
        self._num_runs = 0
        self.callback = RecordingCallback(
            sweep.recorder,
            sweep.store,
            lambda config, _: self.queues[config["queue"]],
            environment_tags(),
            progress,
            several_runs=True,
            previous=sweep.previous,
            cost=SweepCost(placement.num_workers if placement.use_gpu else 0),
        )

    def run(self, confirmation: Confirmation | None = None) -> SweepOutcome:
        """Train every pack to its end, then those that confirm what they have found.

        A failing queue has begun at least one pack, so the number of rounds is finite.

        Raises:
            SweepInterrupted: SIGINT or SIGTERM was received; trials that were open are recorded as KILLED.
        """
        own_ray = own_ray_processes()
        planned = [trial.trial_id for trial in self.plan.trials]
        with ended_by_signals(own_ray) as signals:
            try:
                self._run_all(signals, self.plan if confirmation is None else confirmation.whole_plan)
                further = confirmation.plan() if confirmation is not None and not signals else None
                if further is not None:
                    planned += [trial.trial_id for trial in further.trials]
                    self.plan = further
                    self._run_all(signals, further)
            except KeyboardInterrupt:
                if not signals:
                    raise
            finally:
                own_ray.clear()  # the rest needs no Ray, so its end no longer matters
                self.callback.close(planned, is_whole=confirmation is None or not confirmation.is_outstanding)
        if signals:
            raise SweepInterrupted(self.sweep.name, signals[0])
        return self.callback.outcome

    def _run_all(self, signals: Sequence[int], whole_plan: Plan) -> None:
        """Train the packs of the present plan; whole_plan: with the trials that ended in earlier runs."""
        if self.sweep.previous is not None:
            mark_diverged_before(self.sweep.store, whole_plan, self.sweep.previous)
        waiting = list(self.plan.packs)
        while waiting:
            if signals:
                return
            queues = queues_on(waiting, self.plan.experiment, self.placement, first=len(self.queues))
            self.queues |= {queue.queue_id: queue for queue in queues}
            self._tune(queues, self._num_runs)
            self._num_runs += 1
            if signals:
                return
            waiting = self.callback.left_by_failed_queues()
        self.callback.fail_unbegun(self.plan.packs, NEVER_BEGUN)

    def _tune(self, queues: Sequence[PackQueue], number: int) -> None:
        """Run Tune once over these queues; `number` counts Tune's runs within the sweep."""
        experiment, sweep = self.plan.experiment, self.sweep
        storage = below(storage_uri(experiment), "ray")
        trainable = lightweight(
            tune.with_parameters(
                queue_trainable(experiment, self.placement, below(storage, sweep.tune_name), sweep.store),
                queues={queue.queue_id: queue for queue in queues},
                rows=self.rows,
            )
        )
        with quiet_tune(), stop_handler_kept():
            tune.Tuner(
                trainable,
                param_space={"queue": tune.grid_search([queue.queue_id for queue in queues])},
                tune_config=tune.TuneConfig(max_concurrent_trials=max(1, self.placement.num_packs)),
                run_config=tune.RunConfig(
                    name=sweep.tune_name if number == 0 else f"{sweep.tune_name}.{number}",
                    storage_path=storage,
                    callbacks=[self.callback],
                    failure_config=tune.FailureConfig(max_failures=MAX_LOST_DRIVERS),
                    verbose=0,
                ),
            ).fit()


def queue_trainable(
    experiment: Experiment, placement: Placement, storage: str, store: TrialStore
) -> Callable[..., None]:
    """The function that trains a queue in a Tune trial; its config names the queue.

    Ray sends it by value; everything it refers to must import quickly in the Tune trial's process.
    """

    def train_queue(config: dict[str, Any], queues: Mapping[str, PackQueue], rows: RowsByConfig) -> None:
        task = WorkerTask(
            queue=queues[config["queue"]],
            rows=rows,
            store=store,
            threads=placement.threads,
            engine=experiment.engine,
            early_stopping=experiment.early_stopping,
            samples=experiment.samples,
            shard=placement.shard,
        )
        try:
            drive_queue(task, placement, storage, max_failures=experiment.workers.max_failures)
        except TrainingFailedError as error:
            # Reported, not raised: Tune would retry a raised error, which helps only if a whole node was lost.
            tune.report({"failure": describe_failure(error)})

    return train_queue


def lightweight(trainable: Any) -> Any:
    """The trainable as a Tune trial that reserves no CPU.

    The trial only waits for its `TorchTrainer`, whose workers have their own resources. If it held a CPU, its workers
    might never be placed. Tune refuses a trial without resources, so it reserves the memory that its process uses.
    """
    return tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": TUNE_TRIAL_BYTES}]))
