"""Builds the objects with which one process trains its queue, and connects them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loragrid.config.experiment import DataConfig, EarlyStoppingConfig, EngineConfig, ModelConfig, SamplesConfig
from loragrid.data.dataset import TokenizedData
from loragrid.training.meters import Stopwatch
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.memory_check import MemoryCheck
from loragrid.worker.open_trials import OpenTrials
from loragrid.worker.pack_estimates import PackEstimates
from loragrid.worker.pack_inputs import PackInputs
from loragrid.worker.pack_trainer import PackTrainer
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.reporter import Reporter, SendUpdate
from loragrid.worker.resident_base import ResidentBase
from loragrid.worker.solo_figures import SoloFigures
from loragrid.worker.trial_log import TrialLogs


@dataclass(frozen=True, kw_only=True)
class QueueWorker:
    """The parts of a worker that `run_queue` and `recover` use."""

    group: ProcessGroup
    inputs: PackInputs
    trainer: PackTrainer
    trials: OpenTrials
    logs: TrialLogs
    reporter: Reporter


def build_worker(
    rows_of: Callable[[ModelConfig, DataConfig], TokenizedData],
    send: SendUpdate,
    store: TrialStore,
    group: ProcessGroup,
    *,
    engine: EngineConfig | None = None,
    early_stopping: EarlyStoppingConfig | None = None,
    shard: bool = False,
    describe: Callable[[Trial, TokenizedData, bool], Mapping[str, str]] | None = None,
    samples: SamplesConfig | None = None,
) -> QueueWorker:
    """One worker of `group`, with nothing loaded.

    rows_of: the rows of a model and data configuration. engine: how steps are run; `compute_deterministically` must be
    called before if it asks for that. early_stopping: packs are evaluated and reported at its rungs. shard: every
    worker holds its share of the base. describe: returns the tags of a trial's worker, base and rows.
    samples: the sample prompts that finished trials answer; None: none.
    """
    logs, stopwatch = TrialLogs(), Stopwatch(time.monotonic)
    reporter = Reporter(send, logs, stopwatch)
    trials = OpenTrials(store, logs, reporter, group)
    resident = ResidentBase(group.device, engine or EngineConfig(), group.num_workers, shard=shard)
    inputs = PackInputs(rows_of, resident, reporter, stopwatch, describe, samples)
    solo = SoloFigures(inputs, resident, trials, logs, reporter)
    estimates = PackEstimates(group.device, group.num_workers, group.num_workers if shard else 1)
    trainer = PackTrainer(
        group=group,
        inputs=inputs,
        resident=resident,
        memory=MemoryCheck(group=group, estimates=estimates, solo=solo),
        solo=solo,
        trials=trials,
        reporter=reporter,
        stopwatch=stopwatch,
        early_stopping=early_stopping,
    )
    return QueueWorker(group=group, inputs=inputs, trainer=trainer, trials=trials, logs=logs, reporter=reporter)
