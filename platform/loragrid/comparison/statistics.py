"""Intervals over seeds and paired tests between methods: what a difference must show before it is called one.

Values that are not finite give no figure, and what so few values do not allow is None: nothing here fails or warns on
them. Intervals and tests are two-sided, at 95 % unless a confidence is asked for.
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
"""So many resolve p-values down to about 0.0005: enough for the correction over forty pairs."""

# Differences that scatter by less than this part of the values themselves differ by rounding alone.
ROUNDING = 1e-12

_RESAMPLED_AT_ONCE = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The mean of `num` values; what so few values do not give (the deviation of one) is None."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    num: int


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """The difference of two methods, first minus second, on the same seeds or the same items.

    test: its name in words. num: pairs. p_adjusted: after Holm's correction over the family it was tested in.
    """

    test: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    num: int


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean, standard deviation (n - 1) and Student's t interval; of one value the mean alone.

    Values that are all the same have an interval of width 0. No values, or one that is not finite: the mean is NaN.
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
    """Student's t test of the mean difference of pairs: the same seed, trained with the one and the other method.

    No p-value and no interval: fewer than two pairs, or differences that are all the same but not zero, whose scatter
    the test would have to divide by. Differences that are all zero: p is 1.

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
    """Bootstrap over test items of the weighted mean difference, sum w (a - b) / sum w; an item keeps its pair.

    For losses an item's value is its mean loss per label and its weight its number of labels, so that the difference
    is that of two test losses; for correctness every weight is 1. Items of weight 0 do not count.

    The resampling is `scipy.stats.bootstrap(paired=True, method="percentile")`: the statistic is a ratio of two sums,
    whose scatter it needs no formula for, and unlike BCa or the studentised bootstrap it stays defined where most
    differences are zero. The percentiles are Hesterberg's (2015, "What teachers should know about the bootstrap",
    section 5.3): expanded as t quantiles exceed normal ones and by sqrt(n / (n - 1)), without which the interval is
    too narrow for few items. p is the largest level at which that interval leaves 0 out, so the two never disagree (a
    permutation test would bring a second source of chance); it is never below what `num_resamples` can tell.
    No p-value and no interval where so few items (below five, by default) ask for percentiles beyond the outermost
    resample.

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
    """McNemar's exact test of two methods on the same items: `scipy.stats.binomtest` on those where they disagree.

    The difference is that of the accuracies; its interval is Tango's (1998, "Equivalence test and confidence interval
    for the difference in proportions for the paired-sample design"), which holds its coverage where few items
    disagree, and has a width where none does. The exact p-value is the more cautious of the two: an interval can just
    leave 0 out at a p just above 0.05.

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
    """Holm's step-down correction: p-values that stay below a level keep the whole family's false positives below it.

    None and NaN (nothing was tested) stay None and are no part of the family.
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
        """Whether the counts are more than z standard errors away from what a true difference of delta expects."""
        # The share of items that the second alone has right, by maximum likelihood: A q^2 + B q + C = 0 with A = 2 n.
        linear = (2 * num - only_first + only_second) * delta - only_first - only_second
        constant = -only_second * delta * (1 - delta)
        share = (math.sqrt(max(0.0, linear**2 - 8 * num * constant)) - linear) / (4 * num)
        variance = num * max(0.0, 2 * share + delta * (1 - delta))
        return abs(only_first - only_second - num * delta) > z * math.sqrt(variance)

    def last_accepted(rejected: float) -> float:
        # Not a root finder: where no item disagrees, the statistic is 0 / 0 at the estimate itself.
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
