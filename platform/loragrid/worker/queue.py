"""Runs a queue: pack after pack, rung after rung; a pack that fails is halved until only the trial at fault fails."""

from collections.abc import Callable, Hashable, Sequence

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.training.failure import Failure
from loragrid.trials.contests import cohort_of
from loragrid.trials.packing import Pack, cut_evenly, sharing_key
from loragrid.trials.successive_halving import rung_steps
from loragrid.trials.trial import Trial
from loragrid.worker.queue_worker import QueueWorker
from loragrid.worker.rung import Rung, stop_settings_behind


def run_queue(packs: Sequence[Pack], worker: QueueWorker, early_stopping: EarlyStoppingConfig | None) -> None:
    """Train every trial of `packs` to its end, or to the rung at which its setting is stopped.

    With successive halving, all packs of a cohort train up to a rung before any of them continues, also packs that
    cannot share a base (another batch size, a method that writes the base). The trials that continue form new packs,
    which use the rows of the stopped ones.
    """
    worker.trainer.solo.expect([trial for pack in packs for trial in pack.trials])
    if early_stopping is None:
        for pack in packs:
            _train_up_to(pack.trials[0].training.num_steps, [pack], worker)
        return
    cohorts: dict[Hashable, list[Pack]] = {}
    for pack in packs:
        cohorts.setdefault(cohort_of(pack.trials[0]), []).append(pack)
    for cohort in cohorts.values():
        _run_through_rungs(cohort, worker, early_stopping)


def _run_through_rungs(packs: Sequence[Pack], worker: QueueWorker, config: EarlyStoppingConfig) -> None:
    steps = packs[0].trials[0].training.num_steps
    most: dict[object, int] = {}
    for pack in packs:
        key = sharing_key(pack.trials[0])
        most[key] = max(len(pack.trials), most.get(key, 1))
    waiting = list(packs)
    for number, until in enumerate(rung_steps(config, steps), start=1):
        _train_up_to(until, waiting, worker)
        if until < steps:
            stop_settings_behind(waiting, worker, Rung(number=number, step=until, config=config))
            going_on: dict[object, list[Trial]] = {}
            for trial in (trial for pack in waiting for trial in pack.trials if trial.trial_id in worker.trials):
                going_on.setdefault(sharing_key(trial), []).append(trial)
            parts = [part for key, trials in going_on.items() for part in cut_evenly(trials, most[key])]
            # Named after the rung that they train to next.
            waiting = [
                Pack(pack_id=f"{packs[0].pack_id}-rung{number + 1}.{index}", trials=part)
                for index, part in enumerate(parts)
            ]


def _train_up_to(until: int, packs: Sequence[Pack], worker: QueueWorker) -> None:
    worker.reporter.until = until
    for pack in packs:
        for part in worker.trials.remaining(pack, until):
            _train_or_halve(part, until, worker)


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
