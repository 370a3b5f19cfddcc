"""Runs a queue: pack after pack, rung after rung; a pack that fails is halved until only the trial at fault fails."""

import itertools
from collections.abc import Callable, Sequence

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.training.failure import Failure
from loragrid.trials.packing import Pack, cut_evenly, sharing_key
from loragrid.trials.successive_halving import rung_steps
from loragrid.worker.queue_worker import QueueWorker
from loragrid.worker.rung import Rung, stop_trials_behind


def run_queue(packs: Sequence[Pack], worker: QueueWorker, early_stopping: EarlyStoppingConfig | None) -> None:
    """Train every trial of `packs` to its end, or to the rung at which it is stopped.

    With successive halving, all packs that can share a base train up to a rung before any of them continues. The
    trials that continue form new packs, which use the rows of the stopped ones.
    """
    worker.trainer.solo.expect([trial for pack in packs for trial in pack.trials])
    for _, cohort in itertools.groupby(packs, lambda pack: sharing_key(pack.trials[0])):
        waiting = list(cohort)
        steps = waiting[0].trials[0].training.steps
        most, name = max(len(pack.trials) for pack in waiting), waiting[0].pack_id
        for number, until in enumerate(rung_steps(early_stopping, steps), start=1):
            worker.reporter.until = until
            for pack in waiting:
                for part in worker.trials.remaining(pack, until):
                    _train_or_halve(part, until, worker)
            if early_stopping is not None and until < steps:
                stop_trials_behind(waiting, worker, Rung(number=number, step=until, config=early_stopping))
                # Named after the rung that they train to next.
                going_on = [trial for pack in waiting for trial in pack.trials if trial.trial_id in worker.trials]
                waiting = [
                    Pack(pack_id=f"{name}-rung{number + 1}.{index}", trials=part)
                    for index, part in enumerate(cut_evenly(going_on, most))
                ]


def _train_or_halve(pack: Pack, until: int, worker: QueueWorker) -> None:
    """Train a pack; if it fails, train its halves from where the pack began; if a pack of one fails, end its trial."""
    failure = _failure_of(lambda: worker.inputs.load_base(pack), worker)
    if failure is None:
        failure = _failure_of(lambda: worker.trainer.train(pack, until), worker)
        if failure is None:
            return
        if len(pack.trials) > 1:
            # Trials that ended before the pack failed (while measured, checked or saved) are left out.
            for half in worker.trials.without_ended(pack).halves():
                worker.reporter.split(half, pack, failure.reason)
                _train_or_halve(half, until, worker)
            return
    left = worker.trials.without_ended(pack)
    worker.trials.end(pack, {trial.trial_id: failure.end() for trial in left.trials}, failure.tags())


def _failure_of(action: Callable[[], object], worker: QueueWorker) -> Failure | None:
    """Run `action` and return its failure, if the worker can continue after it; None if nothing fails."""
    try:
        action()
        return None
    except Exception as error:
        if not worker.group.outlives(error):
            raise
        failure = Failure.of(error)
    # Not in the handler: until it is left, the exception and its frames keep the pack's memory.
    worker.trainer.release()
    return failure
