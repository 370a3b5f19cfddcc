"""Compares the trials of a queue at a rung of successive halving, and ends those that are not among the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.trials.outcome import STOPPED_EARLY, TrialEnd
from loragrid.trials.packing import Pack
from loragrid.trials.successive_halving import rank, survivors
from loragrid.worker.queue_worker import QueueWorker


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A step at which trials are compared; rungs count from 1."""

    number: int
    step: int
    config: EarlyStoppingConfig

    def best(self, ranking: Sequence[str]) -> Sequence[str]:
        """The trials of a ranking that continue."""
        return survivors(ranking, self.config.reduction_factor)

    def ends(self, ranking: Sequence[str], losses: Mapping[str, float]) -> dict[str, TrialEnd]:
        """The ends of the trials of a ranking that have a loss and are not among the best."""
        best = self.best(ranking)
        return {
            trial_id: TrialEnd(
                status="KILLED",
                reason=f"{STOPPED_EARLY} at rung {self.number} (step {self.step}): {self.config.metric} "
                f"{losses[trial_id]:.4g} is number {place} of {len(ranking)}, {len(best)} continue",
            )
            for place, trial_id in enumerate(ranking, start=1)
            if trial_id in losses and trial_id not in best
        }


def stop_trials_behind(packs: Sequence[Pack], worker: QueueWorker, rung: Rung) -> None:
    """End the trials that are not among the best at this rung; comparisons made before a resumption keep their result.

    Trials that were compared before are not compared again: they may have trained further in the meantime.
    """
    trial_ids = [trial.trial_id for pack in packs for trial in pack.trials if trial.trial_id in worker.trials]
    all_losses = worker.logs.latest(trial_ids, rung.config.metric)
    decided = worker.logs.rankings(trial_ids, rung.number)
    for ranking in decided:
        _end_trials(packs, worker, rung, rung.ends(ranking, all_losses), {})
    losses = {key: loss for key, loss in all_losses.items() if not any(key in ranking for ranking in decided)}
    if losses:
        ranking = rank(losses)
        # Saved before any trial ends: workers that take over in between must not rank only the remaining trials.
        unsaved = worker.trials.pass_rung(rung.best(ranking), ranking, rung.number)
        _end_trials(packs, worker, rung, rung.ends(ranking, losses), unsaved)


def _end_trials(
    packs: Sequence[Pack],
    worker: QueueWorker,
    rung: Rung,
    stopped: Mapping[str, TrialEnd],
    unsaved: Mapping[str, TrialEnd],
) -> None:
    """End the stopped trials, and those of the best whose states could not be saved."""
    tags = {"loragrid.rung": str(rung.number)}
    for pack in packs:
        ids = [trial.trial_id for trial in pack.trials]
        worker.trials.end(pack, {key: stopped[key] for key in ids if key in stopped}, tags)
        worker.trials.end(pack, {key: unsaved[key] for key in ids if key in unsaved}, {})
