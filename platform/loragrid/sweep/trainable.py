"""Runs LoraGrid inside the user's own Tune sweep: a trainable, and the callback that records it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import ray
from ray import tune

from loragrid.config.experiment import DataConfig, Experiment, ModelConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.models.loading import load_tokenizer
from loragrid.planning.placement import place
from loragrid.sweep.callback import RecordingCallback
from loragrid.sweep.cluster import cluster_nodes
from loragrid.sweep.ray_internals import check_ray_version
from loragrid.sweep.ray_trainer import drive_queue
from loragrid.sweep.record import open_recorder, sweep_parameters
from loragrid.sweep.storage import below, storage_uri, trial_store
from loragrid.sweep.tune_runner import lightweight
from loragrid.trials.expand import trial_from_axes
from loragrid.trials.lengths import NumRows, complete_trial
from loragrid.trials.packing import Pack, PackQueue
from loragrid.trials.tags import QUESTION_TAG
from loragrid.worker.environment import environment_tags
from loragrid.worker.messages import WorkerTask


def trainable(experiment: Experiment) -> Callable[[dict[str, Any]], None]:
    """A Tune trainable whose config is one point of the experiment: axis path -> value.

    An example is `{"method.name": "lora", "method.rank": 8, "training.lr": 1e-3, "seed": 0}`. Keys that a point leaves
    out come from the experiment. Every report has `step` and the latest `train_loss` and `eval_loss` (evaluated every
    `training.eval_every` steps; infinite once the trial has diverged), so any searcher and scheduler of Tune can drive
    it. Pass it to your own `tune.Tuner`; add `recording(experiment)` to the callbacks of its `RunConfig` to record the
    trials in MLflow.

    Raises:
        ValueError: the installed Ray is not supported, or the experiment sets `early_stopping` or `confirm`, because
            here only the `Tuner` decides which trials there are and when they stop. In the Tune trial: the point is no
            trial of the experiment.
    """
    check_ray_version()
    if experiment.confirm is not None:
        raise ValueError("confirm: your Tuner decides which trials there are; allowed here: null")
    if experiment.early_stopping is not None:
        raise ValueError("early_stopping: give your Tuner a scheduler instead; allowed here: null")
    storage = below(storage_uri(experiment), "ray", experiment.name)
    store = trial_store(experiment, experiment.name)

    def train_point(config: dict[str, Any]) -> None:
        queue = queue_at(experiment, config, tune.get_context().get_trial_id())
        trial = queue.trials[0]
        data = _rows(trial.model, trial.data)
        placement = place(experiment.workers, cluster_nodes())
        task = WorkerTask(
            queue=queue,
            rows={(trial.model, trial.data): ray.put(data)},
            store=store,
            threads=placement.threads,
            engine=experiment.engine,
            samples=experiment.samples,
            by_tune=True,
            shard=placement.shard,
        )
        drive_queue(task, placement, storage)

    return lightweight(train_point)  # type: ignore[no-any-return]


def queue_at(experiment: Experiment, axes: Mapping[str, Any], tune_trial_id: str) -> PackQueue:
    """A queue with the one trial at a point. The trial's id contains Tune's, because a searcher may repeat a point.

    Raises:
        ValueError: the point is no trial of the experiment, or its data cannot be read.
    """
    trial = trial_from_axes(experiment, axes)
    data = _rows(trial.model, trial.data)
    forgetting = 0 if data.held_out_text is None else len(data.held_out_text)
    trial = complete_trial(trial, NumRows(train=len(data.train), forgetting=forgetting))
    trial_id = f"{trial.trial_id}-{tune_trial_id}"
    pack = Pack(pack_id=trial_id, trials=(replace(trial, trial_id=trial_id),))
    return PackQueue(queue_id=trial_id, packs=(pack,))


@lru_cache(maxsize=1)
def _rows(model: ModelConfig, data: DataConfig) -> TokenizedData:
    return load_data(data, model, load_tokenizer(model))


def recording(experiment: Experiment, name: str | None = None) -> RecordingCallback:
    """A Tune callback that records a sweep over `trainable(experiment)`: one MLflow run per trial, under one sweep."""
    recorder = open_recorder(experiment)
    recorder.start_sweep(
        name or recorder.next_sweep_name(), sweep_parameters(experiment), {QUESTION_TAG: experiment.question}
    )
    return RecordingCallback(
        recorder,
        trial_store(experiment, experiment.name),
        lambda config, tune_trial_id: queue_at(experiment, config, tune_trial_id),
        environment_tags(),
    )
