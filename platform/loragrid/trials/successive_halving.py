"""Successive halving: which steps are rungs, how settings are ranked there, and which continue.

Jamieson & Talwalkar 2016 (arXiv 1502.07943): after every rung the best 1 / reduction_factor continue. Here a setting
is ranked, not a trial: a verdict needs all seeds of a setting, and single trials that survive are mostly lucky seeds.
"""

from collections.abc import Sequence
from typing import NamedTuple

from loragrid.config.execution import EarlyStoppingConfig


class SettingScore(NamedTuple):
    """A setting at a rung: the mean loss over its `num_seeds` trials that are still open.

    has_diverged: another of its trials has diverged. Trials that failed for another reason are only left out.
    """

    setting_id: str
    mean: float
    num_seeds: int
    has_diverged: bool


def rung_steps(config: EarlyStoppingConfig | None, steps: int) -> list[int]:
    """The steps at which settings are ranked (grace_steps times powers of reduction_factor), then the last step."""
    rungs: list[int] = []
    if config is not None:
        rung = config.grace_steps
        while rung < steps:
            rungs.append(rung)
            rung *= config.reduction_factor
    return [*rungs, steps]


def score(setting_id: str, losses: Sequence[float], *, has_diverged: bool) -> SettingScore:
    """The score of a setting from the losses of its open trials; at least one."""
    mean = sum(losses) / len(losses)
    return SettingScore(setting_id=setting_id, mean=mean, num_seeds=len(losses), has_diverged=has_diverged)


def rank(scores: Sequence[SettingScore]) -> list[SettingScore]:
    """The settings, lowest mean loss first; those that diverged in a seed come last, and ties keep their order."""
    return sorted(scores, key=lambda own: (own.has_diverged, own.mean))


def survivors(ranking: Sequence[SettingScore], reduction_factor: int) -> Sequence[SettingScore]:
    """The first settings of a ranking: one in `reduction_factor`, at least one."""
    return ranking[: num_survivors(len(ranking), reduction_factor)]


def num_survivors(num_settings: int, reduction_factor: int) -> int:
    """How many of so many settings continue."""
    return min(num_settings, max(1, num_settings // reduction_factor))
