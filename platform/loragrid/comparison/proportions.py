"""Intervals for proportions that stay within 0 to 1, also if all answers or nearly all are equal."""

import numpy as np
from scipy import special

from loragrid.comparison.method_scores import Floats

FEWEST_DIFFERING = 10
"""A pair of proportions is not tested if its rates differ in fewer groups than this."""


def proportion_interval(
    mean: Floats, variance: Floats, degrees: Floats, effective_groups: float, tail: float
) -> tuple[Floats, Floats]:
    """(low, high) of expected proportions, each missed with probability `tail`; all arrays (M,).

    Korn and Graubard (1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data", Survey Methodology 24: 193): Clopper and Pearson's exact interval for the number of
    independent answers that would have this variance, n = p (1 - p) / V, reduced by (normal quantile / t quantile)²
    for the degrees of freedom of V. Without any variance, n is the effective number of groups.
    """
    spread = mean * (1 - mean)
    reduction = (special.ndtri(1 - tail) / special.stdtrit(degrees, 1 - tail)) ** 2
    seen = (variance > 0) & (spread > 0)
    number = np.divide(spread * reduction, variance, out=np.full(len(mean), float(effective_groups)), where=seen)
    count = mean * number
    low = special.betaincinv(np.maximum(count, 1e-300), number - count + 1, tail)
    return np.where(count > 0, low, 0.0), share_bound(count, number, tail)


def share_bound(count: Floats, number: Floats | float, tail: float) -> Floats:
    """Clopper and Pearson's upper bound of a share that was seen `count` times in `number`; above 0 if count is 0."""
    bound = special.betaincinv(count + 1, np.maximum(number - count, 1e-300), 1 - tail)
    return np.where(count < number, bound, 1.0)
