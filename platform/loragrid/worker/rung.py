"""Ranks the settings of a queue at a rung of successive halving, and ends those that are not among the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.trials.contests import by_contest, by_setting, method_of
from loragrid.trials.outcome import STOPPED_EARLY, TrialEnd
from loragrid.trials.packing import Pack
from loragrid.trials.successive_halving import SettingScore, rank, score, survivors
from loragrid.trials.trial import Trial
from loragrid.worker.queue_worker import QueueWorker


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A step at which settings are ranked; rungs count from 1."""

    number: int
    step: int
    config: EarlyStoppingConfig

    def best(self, ranking: Sequence[SettingScore]) -> set[str]:
        """The ids of the settings of a ranking that continue."""
        return {own.setting_id for own in survivors(ranking, self.config.reduction_factor)}

    def ends(self, ranking: Sequence[SettingScore], contest: Sequence[Trial]) -> dict[str, TrialEnd]:
        """The ends of the contest's open trials whose settings are in the ranking and not among the best."""
        best = self.best(ranking)
        places = {own.setting_id: place for place, own in enumerate(ranking, start=1)}
        rivals = "all methods" if self.config.within == "sweep" else method_of(contest[0])
        return {
            trial.trial_id: TrialEnd(
                status="KILLED",
                reason=f"{STOPPED_EARLY} at rung {self.number} (step {self.step}): {self.config.metric} "
                f"{_score_words(ranking[place - 1])} is setting number {place} of {len(ranking)} of {rivals}, "
                f"{len(best)} {'continues' if len(best) == 1 else 'continue'}",
            )
            for trial in contest
            if (place := places.get(trial.setting_id)) is not None and trial.setting_id not in best
        }


def stop_settings_behind(packs: Sequence[Pack], worker: QueueWorker, rung: Rung) -> None:
    """End the trials whose settings are not among the best of their contest at this rung.

    Rankings made before a resumption keep their result: their settings may have trained further in the meantime.
    """
    open_trials = [trial for pack in packs for trial in pack.trials if trial.trial_id in worker.trials]
    stopped: dict[str, TrialEnd] = {}
    unsaved: dict[str, TrialEnd] = {}
    for contest in by_contest(open_trials, rung.config):
        rankings = worker.logs.rankings([trial.trial_id for trial in contest], rung.number)
        known = {own.setting_id for ranking in rankings for own in ranking}
        scores = _scores([trial for trial in contest if trial.setting_id not in known], worker, rung.config.metric)
        if scores:
            ranking = rank(scores)
            rankings.append(ranking)
            # Saved before any trial ends: workers that take over in between must not rank only the remaining settings.
            best = rung.best(ranking)
            going_on = [trial for trial in contest if trial.setting_id in best]
            unsaved |= worker.trials.pass_rung(going_on, ranking, rung.number)
        for ranking in rankings:
            stopped |= rung.ends(ranking, contest)
    _end_trials(packs, worker, rung, stopped, unsaved)


def _scores(trials: Sequence[Trial], worker: QueueWorker, metric: str) -> list[SettingScore]:
    """The scores of the trials' settings, without those that have no loss."""
    found = []
    for setting in by_setting(trials):
        losses = list(worker.logs.latest([trial.trial_id for trial in setting], metric).values())
        setting_id = setting[0].setting_id
        if losses:
            found.append(score(setting_id, losses, has_diverged=setting_id in worker.logs.diverged_settings))
    return found


def _score_words(own: SettingScore) -> str:
    """The mean loss and what it is the mean of, such as `1.234 (mean of 3 seeds)`."""
    words = [f"mean of {own.num_seeds} seeds"] if own.num_seeds > 1 else []
    words += ["another seed diverged"] if own.has_diverged else []
    return f"{own.mean:.4g}" + (f" ({', '.join(words)})" if words else "")


def _end_trials(
    packs: Sequence[Pack],
    worker: QueueWorker,
    rung: Rung,
    stopped: Mapping[str, TrialEnd],
    unsaved: Mapping[str, TrialEnd],
) -> None:
    """End the stopped trials, and those of the best settings whose states could not be saved."""
    tags = {"loragrid.rung": str(rung.number)}
    for pack in packs:
        ids = [trial.trial_id for trial in pack.trials]
        worker.trials.end(pack, {key: stopped[key] for key in ids if key in stopped}, tags)
        worker.trials.end(pack, {key: unsaved[key] for key in ids if key in unsaved}, {})
