"""Intervals over seeds and paired tests between methods.

Values that are not finite, or too few values, lead to None or NaN in the results, never to an error or a warning.
Intervals and tests are two-sided; the confidence is 95 % unless stated otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95

BOOTSTRAP_SEED = 0
NUM_RESAMPLES = 4999
"""This number resolves p-values down to about 0.0005, which is enough for the correction over forty pairs."""

# Differences whose range is below this fraction of the values differ only by rounding.
ROUNDING = 1e-12

_RESAMPLED_AT_ONCE = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The mean of `num` values. std, low, high: None if there are too few values, such as one."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    num: int


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """The difference of two methods, first minus second, on the same seeds or the same items.

    test: the test's name in words. num: the number of pairs. p_adjusted: the p-value after Holm's correction.
    """

    test: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    num: int


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean, standard deviation (n - 1) and Student's t interval; for one value only the mean.

    Values that are all equal have an interval of width 0. Without values, or with one that is not finite, the mean is
    NaN.
    """
    sample = np.asarray(values, dtype=float)
    num = len(sample)
    if num == 0 or not np.isfinite(sample).all():
        return Interval(mean=math.nan, std=None, low=None, high=None, num=num)
    mean = float(sample.mean())
    if num == 1:
        return Interval(mean=mean, std=None, low=None, high=None, num=1)
    if np.ptp(sample) == 0:
        return Interval(mean=float(sample[0]), std=0.0, low=float(sample[0]), high=float(sample[0]), num=num)
    std = float(sample.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, num - 1)) * std / math.sqrt(num)
    return Interval(mean=mean, std=std, low=mean - half, high=mean + half, num=num)


def paired_t(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Student's t test of the mean difference of pairs. A pair is one seed, trained with both methods.

    There is no p-value and no interval for fewer than two pairs, or for differences that are all equal but not zero,
    because the test would divide by their deviation. If all differences are zero, p is 1.

    Raises:
        ValueError: the lengths differ.
    """
    name = "paired t test"
    a, b = _pairs(first, second)
    num = len(a)
    if num == 0 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return _untested(name, math.nan, num)
    difference = float((a - b).mean())
    if num == 1:
        return _untested(name, difference, num)
    if _is_constant(a, b):
        return _constant(name, a, b)
    result = stats.ttest_rel(a, b)
    low, high = result.confidence_interval(CONFIDENCE)
    return _tested(name, difference, float(low), float(high), float(result.pvalue), num)


def paired_bootstrap(
    first_items: Sequence[float],
    second_items: Sequence[float],
    weights: Sequence[float],
    seed: int = BOOTSTRAP_SEED,
    num_resamples: int = NUM_RESAMPLES,
) -> PairedTest:
    """Paired bootstrap over test items of the weighted mean difference, sum w (a - b) / sum w.

    For losses, an item's value is its mean loss per label and its weight is its number of labels, so that the result is
    the difference of two test losses. For correctness, every weight is 1. Items of weight 0 are left out.

    The resampling is `scipy.stats.bootstrap(paired=True, method="percentile")`. It needs no formula for the deviation
    of a ratio of two sums, and unlike BCa or the studentised bootstrap it is defined if most differences are zero.
    The percentiles follow Hesterberg (2015, "What teachers should know about the bootstrap", section 5.3): they are
    expanded by the ratio of t to normal quantiles and by sqrt(n / (n - 1)), because the interval would otherwise be too
    narrow for few items. p is 1 minus the largest confidence whose interval excludes 0, so that p and the interval
    never disagree; a permutation test would add a second source of chance. `num_resamples` bounds p from below.
    There is no p-value and no interval if the percentiles lie beyond the outermost resample; by default this holds for
    fewer than five items.

    Raises:
        ValueError: the lengths differ, or a weight is negative.
    """
    name = "paired bootstrap over items"
    a, b = _pairs(first_items, second_items)
    w, _ = _pairs(weights, first_items)
    if (w < 0).any():
        raise ValueError("a weight is negative; allowed: numbers of 0 or more")
    counted = ~(w == 0)
    a, b, w = a[counted], b[counted], w[counted]
    num = len(a)
    if num == 0 or not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(w).all()):
        return _untested(name, math.nan, num)
    weighted = w * (a - b)
    difference = float(weighted.sum() / w.sum())
    if num == 1:
        return _untested(name, difference, num)
    if _is_constant(a, b):
        return _constant(name, a, b)
    expansion = math.sqrt(num / (num - 1))
    tail = float(stats.norm.sf(expansion * stats.t.ppf((1 + CONFIDENCE) / 2, num - 1)))
    if tail < 1 / (num_resamples + 1):
        return _untested(name, difference, num)
    result = stats.bootstrap(
        (weighted, w),
        lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=num_resamples,
        batch=max(1, _RESAMPLED_AT_ONCE // num),
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    resampled = result.bootstrap_distribution
    beyond = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    # The observed sample counts as one of the resamples, as in a permutation test: p is never 0.
    t = float(stats.norm.ppf((beyond + 1) / (num_resamples + 1))) / expansion
    p_value = min(1.0, 2 * float(stats.t.cdf(t, num - 1)))
    return _tested(name, difference, float(low), float(high), p_value, num)


def mcnemar(first_correct: Sequence[bool], second_correct: Sequence[bool]) -> PairedTest:
    """McNemar's exact test of two methods on the same items: `scipy.stats.binomtest` on the items where they disagree.

    `difference` is that of the accuracies. Its interval is Tango's (1998, "Equivalence test and confidence interval
    for the difference in proportions for the paired-sample design"), which keeps its coverage if few items disagree,
    and has a positive width if none does. The exact p-value is more conservative: the interval can just exclude 0 while
    p is just above 0.05.

    Raises:
        ValueError: the lengths differ, or a value is neither 0 nor 1.
    """
    name = "McNemar's exact test"
    a, b = _pairs(first_correct, second_correct)
    num = len(a)
    if np.isnan(a).any() or np.isnan(b).any() or num == 0:
        return _untested(name, math.nan, num)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("an item is neither correct nor wrong; allowed: 0 and 1")
    only_first, only_second = int((a > b).sum()), int((a < b).sum())
    discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    low, high = _tango_interval(only_first, only_second, num)
    return _tested(name, (only_first - only_second) / num, low, high, p_value, num)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of the p-values of a family of tests.

    If a level is applied to the corrected values, the probability of any false positive in the family is at most that
    level. None and NaN mean "not tested": they become None and do not count as tests.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None and not math.isnan(p))
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _pairs(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"values of shapes {a.shape} and {b.shape} are no pairs; allowed: two lists of one length")
    return a, b


def _is_constant(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    size = max(float(np.abs(a).max()), float(np.abs(b).max()))
    return float(np.ptp(a - b)) <= ROUNDING * size


def _constant(name: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> PairedTest:
    if (a == b).all():
        return _tested(name, 0.0, 0.0, 0.0, 1.0, len(a))
    return _untested(name, float((a - b).mean()), len(a))


def _tango_interval(only_first: int, only_second: int, num: int) -> tuple[float, float]:
    """The differences of two paired proportions that a score test does not reject."""
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    estimate = (only_first - only_second) / num

    def is_rejected(delta: float) -> bool:
        """Whether the counts are more than z standard errors from their expectation if the true difference is delta."""
        # The maximum likelihood estimate of the share of items that only the second has right solves
        # A q^2 + B q + C = 0 with A = 2 n.
        linear = (2 * num - only_first + only_second) * delta - only_first - only_second
        constant = -only_second * delta * (1 - delta)
        share = (math.sqrt(max(0.0, linear**2 - 8 * num * constant)) - linear) / (4 * num)
        variance = num * max(0.0, 2 * share + delta * (1 - delta))
        return abs(only_first - only_second - num * delta) > z * math.sqrt(variance)

    def last_accepted(rejected: float) -> float:
        # Bisection instead of a root finder, because the statistic is 0 / 0 at the estimate if no item disagrees.
        accepted = estimate
        for _ in range(60):
            middle = (accepted + rejected) / 2
            accepted, rejected = (accepted, middle) if is_rejected(middle) else (middle, rejected)
        return accepted

    return last_accepted(-1.0), last_accepted(1.0)


def _tested(name: str, difference: float, low: float, high: float, p_value: float, num: int) -> PairedTest:
    return PairedTest(test=name, difference=difference, low=low, high=high, p_value=p_value, p_adjusted=None, num=num)


def _untested(name: str, difference: float, num: int) -> PairedTest:
    return PairedTest(test=name, difference=difference, low=None, high=None, p_value=None, p_adjusted=None, num=num)
