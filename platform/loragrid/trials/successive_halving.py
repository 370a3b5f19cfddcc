"""Successive halving: which steps are rungs, and which trials continue after one.

Jamieson & Talwalkar 2016 (arXiv 1502.07943): after every rung the best 1 / reduction_factor of the trials continue.
"""

from collections.abc import Mapping, Sequence

from loragrid.config.execution import EarlyStoppingConfig


def rung_steps(config: EarlyStoppingConfig | None, steps: int) -> list[int]:
    """The steps at which trials are compared (grace_steps times powers of reduction_factor), then the last step."""
    rungs: list[int] = []
    if config is not None:
        rung = config.grace_steps
        while rung < steps:
            rungs.append(rung)
            rung *= config.reduction_factor
    return [*rungs, steps]


def rank(losses: Mapping[str, float]) -> list[str]:
    """The trials, lowest loss first; equal losses keep their order."""
    return sorted(losses, key=losses.__getitem__)


def survivors(ranking: Sequence[str], reduction_factor: int) -> Sequence[str]:
    """The first trials of the ranking: one in `reduction_factor`, at least one."""
    return ranking[: max(1, len(ranking) // reduction_factor)]
