"""Successive halving: which steps are rungs, and who goes on from one.

Jamieson & Talwalkar 2016 (arXiv 1502.07943): at every rung the best 1 / reduction_factor of the trials go on.
"""

from collections.abc import Mapping

from loragrid.config_sections import EarlyStoppingConfig


def rung_steps(config: EarlyStoppingConfig | None, steps: int) -> list[int]:
    """The steps at which trials are compared, then the last step: grace_steps times powers of reduction_factor."""
    rungs: list[int] = []
    if config is not None:
        rung = config.grace_steps
        while rung < steps:
            rungs.append(rung)
            rung *= config.reduction_factor
    return [*rungs, steps]


def survivors(losses: Mapping[str, float], reduction_factor: int) -> list[str]:
    """The trials with the lowest losses, best first: one in `reduction_factor`, at least one; of equals the earlier."""
    ranked = sorted(losses, key=losses.__getitem__)
    return ranked[: max(1, len(ranked) // reduction_factor)]
