"""Contests: which settings successive halving ranks together, and how they are divided over places."""

from collections.abc import Hashable, Iterable, Sequence

from loragrid.config.execution import EarlyStoppingConfig
from loragrid.trials.trial import Trial


def cohort_of(trial: Trial) -> Hashable:
    """A key that is equal for trials that pass their rungs together: same model, data, task and number of steps.

    Other losses cannot be compared, and after another number of steps a schedule is at another place.
    """
    return (trial.model, trial.data, trial.task, trial.training.steps)


def contest_of(trial: Trial, config: EarlyStoppingConfig) -> Hashable:
    """A key that is equal for trials whose settings are ranked together: of one cohort and, if asked, one method.

    A method is the name under which trials are compared, so blocks that share a label are in one contest.
    """
    return (cohort_of(trial), "" if config.within == "sweep" else method_of(trial))


def method_of(trial: Trial) -> str:
    """The trial's method as comparisons name it: its label, otherwise the method's name."""
    return trial.label or trial.method.name


def by_contest(trials: Iterable[Trial], config: EarlyStoppingConfig) -> list[list[Trial]]:
    """The trials of each contest, both in the given order."""
    contests: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        contests.setdefault(contest_of(trial, config), []).append(trial)
    return list(contests.values())


def by_setting(trials: Iterable[Trial]) -> list[list[Trial]]:
    """The trials of each setting, both in the given order."""
    settings: dict[str, list[Trial]] = {}
    for trial in trials:
        settings.setdefault(trial.setting_id, []).append(trial)
    return list(settings.values())


def divide(trials: Sequence[Trial], config: EarlyStoppingConfig, num_places: int) -> list[list[Trial]]:
    """The trials in at most `num_places` parts of nearly equal work; one place trains one part, rung after rung.

    A setting is never divided. With fewer places than contests, a part holds whole contests. With more places, the
    settings of a contest are dealt out to several parts, each of at least `reduction_factor` settings: fewer could not
    be reduced as asked. Each part ranks its own settings, so each keeps at least one. num_places: 0 if the size of the
    cluster is not known, then every contest is a part.
    """
    contests = by_contest(trials, config)
    if num_places == 0:
        return contests
    if num_places <= len(contests):
        return _joined(contests, num_places)
    settings = [by_setting(contest) for contest in contests]
    most = [max(1, len(own) // config.reduction_factor) for own in settings]
    num_parts = [1] * len(contests)
    for _ in range(min(num_places, sum(most)) - len(contests)):
        growing = [index for index in range(len(contests)) if num_parts[index] < most[index]]
        num_parts[max(growing, key=lambda index: _work(contests[index]) / num_parts[index])] += 1
    # Dealt out one by one, each part gets low and high values of every axis.
    return [
        [trial for setting in own[part::parts] for trial in setting]
        for own, parts in zip(settings, num_parts, strict=True)
        for part in range(parts)
    ]


def _joined(contests: Sequence[list[Trial]], num_places: int) -> list[list[Trial]]:
    """The contests in parts of nearly equal work: the largest first, each to the part with the least work."""
    parts: list[list[int]] = [[] for _ in range(num_places)]
    loads = [0] * num_places
    for index in sorted(range(len(contests)), key=lambda index: _work(contests[index]), reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += _work(contests[index])
        parts[lightest].append(index)
    return [[trial for index in sorted(part) for trial in contests[index]] for part in parts]


def _work(trials: Sequence[Trial]) -> int:
    return sum(trial.training.batch_size * trial.training.num_steps for trial in trials)
