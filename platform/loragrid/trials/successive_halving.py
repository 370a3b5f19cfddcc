"""Successive halving: which steps are rungs, and who goes on from one.

Jamieson & Talwalkar 2016 (arXiv 1502.07943): at every rung the best 1 / reduction_factor of the trials go on.
"""

from collections.abc import Mapping, Sequence

from loragrid.config.sections import EarlyStoppingConfig


def rung_steps(config: EarlyStoppingConfig | None, steps: int) -> list[int]:
    """The steps at which trials are compared, then the last step: grace_steps times powers of reduction_factor."""
    rungs: list[int] = []
    if config is not None:
        rung = config.grace_steps
        while rung < steps:
            rungs.append(rung)
            rung *= config.reduction_factor
    return [*rungs, steps]


def rank(losses: Mapping[str, float]) -> list[str]:
    """The trials, lowest loss first; of equals the earlier."""
    return sorted(losses, key=losses.__getitem__)


def survivors(ranking: Sequence[str], reduction_factor: int) -> Sequence[str]:
    """The first of the ranking: one in `reduction_factor`, at least one."""
    return ranking[: max(1, len(ranking) // reduction_factor)]
