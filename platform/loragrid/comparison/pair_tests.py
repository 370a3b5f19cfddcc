"""From differences and their variances to tests, intervals and bounds: Student's t, Holm's correction, Hsu's bound."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from loragrid.comparison.method_comparison import LEVEL, Family, MethodEstimate, PairTest
from loragrid.comparison.method_scores import Floats, MethodScores
from loragrid.comparison.proportions import FEWEST_DIFFERING, proportion_interval, share_bound
from loragrid.comparison.statistics import holm
from loragrid.comparison.variance import ROUNDING, Means, Variance, pairs_of

SAME_EVERYWHERE = "the difference is the same in every seed and row, so nothing tells how far it could vary"


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Every pair's difference, first minus second, and what is known of its spread; all arrays (P,).

    unmeasured: the difference is not 0 and no variance is seen. above, below: the number of groups in which the first
    method's rate is higher or lower, for proportions.
    """

    difference: Floats
    error: Floats
    degrees: Floats
    unmeasured: NDArray[np.bool_]
    above: NDArray[np.int64] | None
    below: NDArray[np.int64] | None
    num_groups: int
    effective_groups: float

    @property
    def too_few(self) -> NDArray[np.bool_]:
        """Whether a pair of proportions differs in too few groups to be tested."""
        if self.above is None or self.below is None:
            return np.zeros(len(self.difference), bool)
        few: NDArray[np.bool_] = self.above + self.below < FEWEST_DIFFERING
        return few

    def p_values(self) -> Floats:
        """Two-sided p-values; 1 for a pair without any variance, which is no evidence."""
        t = np.divide(np.abs(self.difference), self.error, out=np.zeros(len(self.error)), where=self.error > 0)
        p: Floats = 2 * special.stdtr(self.degrees, -t)
        return p

    def limits(self, tail: float) -> tuple[Floats, Floats]:
        """(low, high): each is wrong with the probability `tail`. An unmeasured difference has no limits.

        If two proportions differ in too few groups for Student's t, the limits also cover what Clopper and Pearson's
        bounds allow: the difference is at most the share of groups in which the first method has the higher rate.
        """
        half = special.stdtrit(self.degrees, 1 - tail) * self.error
        low, high = self.difference - half, self.difference + half
        if self.above is None or self.below is None:
            return np.where(self.unmeasured, -np.inf, low), np.where(self.unmeasured, np.inf, high)
        scale = self.effective_groups / self.num_groups
        most, least = (
            share_bound(np.asarray(count * scale), self.effective_groups, tail) for count in (self.above, self.below)
        )
        careful = self.too_few | self.unmeasured
        return np.where(careful, np.minimum(low, -least), low), np.where(careful, np.maximum(high, most), high)


def differences_of(scores: MethodScores, means: Means, variance: Variance) -> Differences:
    """The differences of all pairs, in the order of `itertools.combinations`."""
    first, second = pairs_of(len(scores.names))
    mean = means.per_seed.mean(axis=1)
    difference = mean[first] - mean[second]
    size = np.maximum(means.size[first], means.size[second])
    above = below = None
    if scores.is_proportion:
        rates = means.rates[first] - means.rates[second]
        above, below = (rates > ROUNDING).sum(axis=1), (rates < -ROUNDING).sum(axis=1)
    return Differences(
        difference=difference,
        error=np.sqrt(variance[0]),
        degrees=variance[1],
        unmeasured=(variance[0] == 0) & (np.abs(difference) > ROUNDING * size),
        above=above,
        below=below,
        num_groups=means.num_groups,
        effective_groups=means.effective_groups,
    )


def tests_of_pairs(scores: MethodScores, found: Differences, family: Family) -> tuple[PairTest, ...]:
    """The test of every pair. A refused pair counts in Holm's correction with p = 1: the family is fixed beforehand."""
    names = list(itertools.combinations(scores.names, 2))
    in_family = [family.kind == "all_pairs" or family.against in pair for pair in names]
    refusals = [_refusal(found, index) for index in range(len(names))]
    p_values = [1.0 if refusal else float(p) for p, refusal in zip(found.p_values(), refusals, strict=True)]
    adjusted = holm([p if own else None for p, own in zip(p_values, in_family, strict=True)])
    together = found.limits(LEVEL / 2 / max(1, sum(in_family)))
    alone = found.limits(LEVEL / 2)
    return tuple(
        PairTest(
            first=first,
            second=second,
            difference=float(found.difference[i]),
            standard_error=float(found.error[i]),
            degrees_of_freedom=float(found.degrees[i]),
            p_value=None if refusals[i] else p_values[i],
            p_adjusted=None if refusals[i] else adjusted[i],
            low=float((together if in_family[i] else alone)[0][i]),
            high=float((together if in_family[i] else alone)[1][i]),
            pair_low=float(alone[0][i]),
            pair_high=float(alone[1][i]),
            in_family=in_family[i],
            refusal=refusals[i],
            higher_is_better=scores.higher_is_better,
        )
        for i, (first, second) in enumerate(names)
    )


def _refusal(found: Differences, index: int) -> str:
    if found.above is not None and found.below is not None and found.too_few[index]:
        num = int(found.above[index] + found.below[index])
        return f"the rates differ in {num} of {found.num_groups} groups of rows; a claim needs {FEWEST_DIFFERING}"
    return SAME_EVERYWHERE if found.unmeasured[index] else ""


def untested_pairs(scores: MethodScores, means: Means, family: Family, refusal: str) -> tuple[PairTest, ...]:
    """Every pair with its difference and nothing else, because nothing can be claimed."""
    mean = dict(zip(scores.names, means.per_seed.mean(axis=1), strict=True))
    return tuple(
        PairTest(
            first=first,
            second=second,
            difference=float(mean[first] - mean[second]),
            standard_error=np.nan,
            degrees_of_freedom=np.nan,
            p_value=None,
            p_adjusted=None,
            low=-np.inf,
            high=np.inf,
            pair_low=-np.inf,
            pair_high=np.inf,
            in_family=family.kind == "all_pairs" or family.against in (first, second),
            refusal=refusal,
            higher_is_better=scores.higher_is_better,
        )
        for first, second in itertools.combinations(scores.names, 2)
    )


def bounds_behind_best(scores: MethodScores, found: Differences) -> Floats:
    """(M,): how far each method is behind the best at most, right for all methods at once with 95 % confidence.

    Hsu (1984, "Constrained simultaneous confidence intervals for multiple comparisons with the best"), with unequal
    variances: U_i = max(0, max_{j != i} (x_i - x_j + t √V_ij)) with the t quantile 1 - 0.05 / (M - 1), for a loss.
    """
    num_methods = len(scores.names)
    first, second = pairs_of(num_methods)
    low, high = found.limits(LEVEL / (num_methods - 1))
    first_behind, second_behind = (-low, high) if scores.higher_is_better else (high, -low)
    bounds = np.zeros(num_methods)
    np.maximum.at(bounds, first, first_behind)
    np.maximum.at(bounds, second, second_behind)
    return bounds


def estimates_of(
    scores: MethodScores, means: Means, variance: Variance | None, behind: Floats | None
) -> tuple[MethodEstimate, ...]:
    """Every method's mean with the 95 % interval of its expected figure. variance, behind: None if refused."""
    mean = means.per_seed.mean(axis=1)
    if variance is None or behind is None:
        return tuple(
            MethodEstimate(name=name, mean=float(own), low=None, high=None, standard_error=None, behind=None)
            for name, own in zip(scores.names, mean, strict=True)
        )
    error = np.sqrt(variance[0])
    if scores.is_proportion:
        low, high = proportion_interval(mean, *variance, means.effective_groups, LEVEL / 2)
    else:
        half = special.stdtrit(variance[1], 1 - LEVEL / 2) * error
        low, high = mean - half, mean + half
    return tuple(
        MethodEstimate(
            name=name,
            mean=float(mean[i]),
            low=float(low[i]),
            high=float(high[i]),
            standard_error=float(error[i]),
            behind=float(behind[i]) if np.isfinite(behind[i]) else None,
        )
        for i, name in enumerate(scores.names)
    )


def not_behind(names: Sequence[str], tests: Sequence[PairTest]) -> tuple[str, ...]:
    """The methods that are not shown worse than any other, in the order of `names`."""
    worse = {test.second if test.better == test.first else test.first for test in tests if test.better}
    return tuple(name for name in names if name not in worse)
