"""Runs a queue: pack after pack, rung after rung; a pack that fails is halved until the trial at fault stands alone."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.training.failure import Failure
from loragrid.trials.outcome import STOPPED_EARLY, TrialEnd
from loragrid.trials.packing import Pack, cut_evenly, sharing_key
from loragrid.trials.successive_halving import rank, rung_steps, survivors
from loragrid.worker.pack_trainer import PackTrainer


def run_queue(packs: Sequence[Pack], trainer: PackTrainer, early_stopping: EarlyStoppingConfig | None) -> None:
    """Train every trial of `packs` to its end, or to the rung at which it falls behind.

    With successive halving all packs that can share a base train up to a rung before any goes on: those who go on are
    packed anew, so that they take the rows of those who fell behind.
    """
    for _, cohort in itertools.groupby(packs, lambda pack: sharing_key(pack.trials[0])):
        waiting = list(cohort)
        steps = waiting[0].trials[0].training.steps
        rungs = rung_steps(early_stopping, steps)
        most, name = max(len(pack.trials) for pack in waiting), waiting[0].pack_id
        for number, rung in enumerate(rungs, start=1):
            trainer.reports.until = rung
            for pack in waiting:
                for part in trainer.remaining(pack, rung):
                    _train_or_halve(part, rung, trainer)
            if early_stopping is not None and rung < steps:
                _stop_those_behind(waiting, trainer, early_stopping, number, rung)
                # Named after the rung they are on their way to.
                going_on = [trial for pack in waiting for trial in pack.trials if trial.trial_id in trainer.states]
                waiting = [
                    Pack(pack_id=f"{name}-rung{number + 1}.{index}", trials=part)
                    for index, part in enumerate(cut_evenly(going_on, most))
                ]


def _stop_those_behind(
    packs: Sequence[Pack], trainer: PackTrainer, config: EarlyStoppingConfig, number: int, rung: int
) -> None:
    """End the trials that are not among the best at this rung; what was decided before a resumption stays so."""
    trial_ids = [trial.trial_id for pack in packs for trial in pack.trials if trial.trial_id in trainer.states]
    all_losses = trainer.reports.latest(trial_ids, config.metric)
    decided = trainer.reports.rankings(trial_ids, number)
    for ranking in decided:
        losses = {trial_id: all_losses[trial_id] for trial_id in ranking if trial_id in all_losses}
        _stop_those_not_best(packs, trainer, config, number, rung, ranking, losses, {})
    # Not against those who were compared before: these may have trained on since.
    losses = {key: loss for key, loss in all_losses.items() if not any(key in ranking for ranking in decided)}
    if losses:
        ranking = rank(losses)
        # Before any trial ends: workers that take the queue over in between must not rank those that are left.
        unsaved = trainer.go_on(survivors(ranking, config.reduction_factor), ranking, number)
        _stop_those_not_best(packs, trainer, config, number, rung, ranking, losses, unsaved)


def _stop_those_not_best(
    packs: Sequence[Pack],
    trainer: PackTrainer,
    config: EarlyStoppingConfig,
    number: int,
    rung: int,
    ranking: Sequence[str],
    losses: Mapping[str, float],
    unsaved: Mapping[str, TrialEnd],
) -> None:
    """End those of one comparison that are not among its best, and the best whose states cannot be written."""
    best = survivors(ranking, config.reduction_factor)
    for pack in packs:
        ended = {
            trial.trial_id: TrialEnd(
                status="KILLED",
                reason=f"{STOPPED_EARLY} at rung {number} (step {rung}): {config.metric} "
                f"{losses[trial.trial_id]:.4g} is number {ranking.index(trial.trial_id) + 1} of {len(ranking)}, "
                f"{len(best)} go on",
            )
            for trial in pack.trials
            if trial.trial_id in losses and trial.trial_id not in best
        }
        trainer.end(pack, ended, {"loragrid.rung": str(number)})
        trainer.end(
            pack, {trial.trial_id: unsaved[trial.trial_id] for trial in pack.trials if trial.trial_id in unsaved}, {}
        )


def _train_or_halve(pack: Pack, until: int, trainer: PackTrainer) -> None:
    """Train a pack; where that fails, its halves, from where the pack began; where a trial fails alone, end it."""
    failure = _try(lambda: trainer.load(pack), trainer)
    if failure is None:
        failure = _try(lambda: trainer.train(pack, until), trainer)
        if failure is None:
            return
        if len(pack.trials) > 1:
            for half in _without_ended(pack, trainer).halves():
                trainer.reports.split(half, pack, failure.reason)
                _train_or_halve(half, until, trainer)
            return
    left = _without_ended(pack, trainer)
    trainer.end(pack, {trial.trial_id: failure.end() for trial in left.trials}, failure.tags())


def _without_ended(pack: Pack, trainer: PackTrainer) -> Pack:
    """The pack without trials that ended before it failed: alone, while measured, checked or saved."""
    return replace(pack, trials=tuple(t for t in pack.trials if not trainer.reports.has_ended(t.trial_id)))


def _try(action: Callable[[], object], trainer: PackTrainer) -> Failure | None:
    """What goes wrong, where that can stay the trials' own."""
    try:
        action()
        return None
    except Exception as error:
        if not trainer.place.outlives(error):
            raise
        failure = Failure.of(error)
    # Only here, where the exception and the frames it held are gone, is the pack's memory free.
    trainer.release()
    return failure
