"""Confidence intervals and tests agree with scipy, with closed forms and with simulated error rates."""

import itertools
import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import optimize, stats

from loragrid.comparison.statistics import holm, mcnemar, paired_bootstrap, paired_t, t_interval


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def tolerance(share: float, num_simulations: int) -> float:
    """3.3 standard errors of a simulated share; a correct share is farther away once in a thousand runs."""
    return 3.3 * math.sqrt(share * (1 - share) / num_simulations)


def test_the_t_interval_is_scipys() -> None:
    values = [2.31, 2.35, 2.29, 2.40]
    interval = t_interval(values)
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert [interval.low, interval.high] == pytest.approx([reference.low, reference.high])
    assert interval.mean == pytest.approx(2.3375)
    assert interval.std == pytest.approx(np.std(values, ddof=1))
    assert interval.num == 4
    # Closed form for two values: t with one degree of freedom is Cauchy, tan(0.475 pi) times half their distance.
    pair = t_interval([1.0, 3.0])
    assert pair.high == pytest.approx(2 + math.tan(0.475 * math.pi))
    narrow = t_interval(values, confidence=0.5)
    assert narrow.high is not None
    assert interval.high is not None
    assert narrow.high < interval.high


def test_one_value_has_a_mean_and_nothing_else() -> None:
    interval = t_interval([2.5])
    assert (interval.mean, interval.std, interval.low, interval.high, interval.num) == (2.5, None, None, None, 1)


def test_equal_values_have_an_interval_of_width_zero() -> None:
    interval = t_interval([0.1, 0.1, 0.1])
    assert (interval.mean, interval.std, interval.low, interval.high, interval.num) == (0.1, 0.0, 0.1, 0.1, 3)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.nan], [1.0, math.inf, -math.inf]])
def test_missing_or_infinite_values_have_no_mean(values: list[float]) -> None:
    interval = t_interval(values)
    assert math.isnan(interval.mean)
    assert (interval.std, interval.low, interval.high, interval.num) == (None, None, None, len(values))


def test_the_paired_t_test_is_scipys() -> None:
    first, second = [2.31, 2.35, 2.29, 2.40], [2.36, 2.37, 2.35, 2.41]
    test = paired_t(first, second)
    reference = stats.ttest_rel(first, second)
    interval = reference.confidence_interval(0.95)
    assert test.difference == pytest.approx(np.mean(first) - np.mean(second))
    assert test.p_value == pytest.approx(reference.pvalue)
    assert [test.low, test.high] == pytest.approx([interval.low, interval.high])
    assert (test.num, test.p_adjusted) == (4, None)
    opposite = paired_t(second, first)
    assert opposite.difference == -test.difference
    assert opposite.p_value == pytest.approx(test.p_value)


def test_equal_methods_differ_by_zero_with_p_1() -> None:
    for test in (
        paired_t([2.0, 3.0], [2.0, 3.0]),
        paired_bootstrap([2.0, 3.0, 1.0], [2.0, 3.0, 1.0], [5, 1, 2]),
    ):
        assert (test.difference, test.low, test.high, test.p_value) == (0.0, 0.0, 0.0, 1.0)
    same = mcnemar([True, False, True], [True, False, True])
    assert (same.difference, same.p_value) == (0.0, 1.0)


def test_differences_that_never_vary_are_told_but_not_tested() -> None:
    # 2.3 - 2.2 and 1.3 - 1.2 differ in floating point; this rounding must not count as a deviation.
    for test in (
        paired_t([2.3, 1.3, 0.3], [2.2, 1.2, 0.2]),
        paired_bootstrap([2.3, 1.3, 0.3], [2.2, 1.2, 0.2], [1, 1, 1]),
    ):
        assert test.difference == pytest.approx(0.1)
        assert (test.low, test.high, test.p_value, test.num) == (None, None, None, 3)


def test_one_pair_is_reported_without_a_test() -> None:
    for test in (paired_t([2.0], [1.5]), paired_bootstrap([2.0], [1.5], [7])):
        assert (test.difference, test.low, test.high, test.p_value, test.num) == (0.5, None, None, None, 1)
    for test in (paired_t([], []), paired_bootstrap([], [], []), mcnemar([], [])):
        assert math.isnan(test.difference)
        assert (test.low, test.high, test.p_value, test.num) == (None, None, None, 0)


def test_values_that_are_not_finite_are_not_tested() -> None:
    for bad in (math.nan, math.inf):
        for test in (
            paired_t([2.0, bad, 1.0], [1.5, 1.0, 1.0]),
            paired_bootstrap([2.0, bad, 1.0], [1.5, 1.0, 1.0], [1, 1, 1]),
        ):
            assert math.isnan(test.difference)
            assert (test.low, test.high, test.p_value) == (None, None, None)
    assert mcnemar([1, math.nan], [1, 0]).p_value is None  # type: ignore[list-item]


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\) are no pairs"):
        paired_t([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="are no pairs"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="a weight is negative"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.5], [1.0, -1.0])
    with pytest.raises(ValueError, match="neither correct nor wrong"):
        mcnemar([1, 2], [1, 0])  # type: ignore[list-item]


def test_the_bootstrap_weights_items_by_their_labels() -> None:
    first, second, labels = [1.0, 3.0, 2.0, 2.0, 1.0, 4.0], [1.5, 2.0, 2.5, 1.0, 1.0, 3.0], [10, 1, 5, 2, 8, 3]
    test = paired_bootstrap(first, second, labels)
    total = sum(labels)
    losses = [sum(w * x for w, x in zip(labels, items, strict=True)) / total for items in (first, second)]
    assert test.difference == pytest.approx(losses[0] - losses[1])
    with_unlabelled = paired_bootstrap([*first, 9.0], [*second, 0.0], [*labels, 0])
    assert with_unlabelled == test


def test_the_bootstrap_with_equal_weights_approximates_the_t_test() -> None:
    generator = np.random.default_rng(3)
    first = generator.normal(0.03, 1.0, 400)
    second = first + generator.normal(0.0, 0.2, 400) - 0.02
    bootstrap, t = paired_bootstrap(first, second, np.ones(400)), paired_t(first, second)  # type: ignore[arg-type]
    assert None not in (bootstrap.low, bootstrap.high, bootstrap.p_value, t.low, t.high, t.p_value)
    width = t.high - t.low  # type: ignore[operator]
    assert bootstrap.low == pytest.approx(t.low, abs=0.05 * width)
    assert bootstrap.high == pytest.approx(t.high, abs=0.05 * width)
    assert bootstrap.p_value == pytest.approx(t.p_value, rel=0.2)


def test_the_bootstrap_is_deterministic_and_antisymmetric() -> None:
    generator = np.random.default_rng(4)
    first, second = generator.normal(size=(2, 50)).tolist()
    weights = generator.integers(1, 9, 50).tolist()
    test = paired_bootstrap(first, second, weights, seed=5)
    assert paired_bootstrap(first, second, weights, seed=5) == test
    assert paired_bootstrap(first, second, weights, seed=6) != test
    opposite = paired_bootstrap(second, first, weights, seed=5)
    assert opposite.difference == pytest.approx(-test.difference)
    assert opposite.low == pytest.approx(-test.high)  # type: ignore[operator]
    assert opposite.p_value == pytest.approx(test.p_value)


def test_bootstrap_p_and_interval_always_agree() -> None:
    seen = set()
    for shift in np.linspace(-0.6, 0.6, 41):
        generator = np.random.default_rng(7)
        first = generator.normal(shift, 1.0, 40).tolist()
        test = paired_bootstrap(first, [0.0] * 40, [1.0] * 40)
        assert test.low is not None
        assert test.high is not None
        assert test.p_value is not None
        outside = test.low > 0 or test.high < 0
        if abs(test.p_value - 0.05) > 0.003:  # a single resample decides here
            assert outside == (test.p_value < 0.05), (shift, test)
            seen.add(outside)
    assert seen == {True, False}


def test_too_few_items_are_not_tested() -> None:
    assert paired_bootstrap([1.0, 2.0, 3.0, 2.0], [0.0] * 4, [1] * 4).p_value is None
    assert paired_bootstrap([1.0, 2.0, 3.0, 2.0, 2.5, 2.0], [0.0] * 6, [1] * 6).p_value is not None


def test_mcnemars_p_is_the_binomial_tail_of_discordant_items() -> None:
    first = [1] * 30 + [1] * 9 + [0] * 2 + [0] * 9
    second = [1] * 30 + [0] * 9 + [1] * 2 + [0] * 9
    test = mcnemar(first, second)  # type: ignore[arg-type]
    assert test.p_value == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert test.difference == pytest.approx(7 / 50)
    assert test.num == 50
    assert test.low is not None
    assert test.high is not None
    assert test.low < test.difference < test.high


@pytest.mark.parametrize(("only_first", "only_second", "num"), [(12, 2, 50), (3, 7, 40), (6, 0, 30), (1, 1, 9)])
def test_the_accuracy_interval_ends_at_score_statistic_z(only_first: int, only_second: int, num: int) -> None:
    first = [1] * only_first + [0] * (num - only_first)
    second = [0] * only_first + [1] * only_second + [0] * (num - only_first - only_second)
    test = mcnemar(first, second)  # type: ignore[arg-type]
    for end in (test.low, test.high):
        assert end is not None

        def minus_log_likelihood(share: float, delta: float = end) -> float:
            counts = (only_first, only_second, num - only_first - only_second)
            shares = (share + delta, share, 1 - 2 * share - delta)
            return -sum(k * math.log(p) for k, p in zip(counts, shares, strict=True) if k)

        # The maximum likelihood share under the constraint, found numerically instead of by Tango's quadratic equation.
        bounds = (max(0.0, -end) + 1e-12, (1 - end) / 2 - 1e-12)
        share = optimize.minimize_scalar(
            minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}
        ).x
        error = math.sqrt((2 * share + end - end**2) / num)
        assert abs(test.difference - end) / error == pytest.approx(stats.norm.ppf(0.975), rel=1e-3)


def test_full_agreement_on_few_items_leaves_a_wide_interval() -> None:
    test = mcnemar([True] * 20, [True] * 20)
    z_squared = stats.norm.ppf(0.975) ** 2
    assert test.high == pytest.approx(z_squared / (20 + z_squared))
    assert test.low == pytest.approx(-z_squared / (20 + z_squared))


def test_holm_is_the_closure_of_bonferroni() -> None:
    p_values = [0.03, 0.001, 0.2, 0.012, 0.04]
    indices = range(len(p_values))
    subsets = [s for size in range(1, 6) for s in itertools.combinations(indices, size)]
    # A hypothesis is rejected if every intersection that contains it is rejected by Bonferroni over its own size.
    closed = [max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets if own in s) for own in indices]
    assert holm(p_values) == pytest.approx(closed)


def test_holm_ignores_untested_pairs_and_stays_below_one() -> None:
    assert holm([0.02, None, 0.5, math.nan, 0.9]) == [pytest.approx(0.06), None, 1.0, None, 1.0]
    assert holm([0.02, 0.02]) == [0.04, 0.04]
    assert holm([]) == []
    assert holm([None]) == [None]


@pytest.mark.parametrize("num", [2, 3, 5])
def test_the_t_interval_covers_95_percent_of_true_means(num: int) -> None:
    simulations = 2000
    samples = np.random.default_rng(11).normal(2.3, 0.02, (simulations, num))
    intervals = [t_interval(sample) for sample in samples]
    covered = np.mean([i.low is not None and i.high is not None and i.low <= 2.3 <= i.high for i in intervals])
    assert covered == pytest.approx(0.95, abs=tolerance(0.95, simulations))


@pytest.mark.parametrize("num", [8, 64])
def test_the_bootstrap_has_nominal_coverage_and_error_rate(num: int) -> None:
    """Rows of very different lengths, whose noise falls with their length; a row is equally hard for both methods.

    The bootstrap is not exact: with eight rows its interval covers 0.93 (of 3,000), so 0.02 is added to the tolerance.
    Plain percentiles cover 0.88 there and fail.
    """
    simulations, shift = 1000 if num == 8 else 500, 0.05
    generator = np.random.default_rng(12)
    covered = false_positives = 0
    for _ in range(simulations):
        labels = generator.integers(4, 64, num)
        difficulty = generator.gamma(4.0, 0.6, num)
        noise = generator.normal(0.0, 0.6, num) / np.sqrt(labels)
        first, second = difficulty + noise, difficulty - shift
        test = paired_bootstrap(list(first), list(second), list(labels), num_resamples=999)
        null = paired_bootstrap(list(first), list(difficulty), list(labels), num_resamples=999)
        assert test.low is not None
        assert test.high is not None
        assert null.p_value is not None
        covered += test.low <= shift <= test.high
        false_positives += null.p_value < 0.05
    assert covered / simulations == pytest.approx(0.95, abs=tolerance(0.95, simulations) + 0.02)
    assert false_positives / simulations == pytest.approx(0.05, abs=tolerance(0.05, simulations) + 0.02)


def test_the_paired_t_test_errs_in_5_percent_of_sweeps() -> None:
    simulations = 2000
    generator = np.random.default_rng(13)
    seeds = generator.normal(0.0, 1.0, (simulations, 3))
    first, second = seeds + generator.normal(0, 0.01, (2, simulations, 3))
    p_values = [paired_t(a, b).p_value for a, b in zip(first, second, strict=True)]
    share = np.mean([p is not None and p < 0.05 for p in p_values])
    assert share == pytest.approx(0.05, abs=tolerance(0.05, simulations))


def test_mcnemar_errs_in_at_most_5_percent_of_sweeps() -> None:
    """Exact tests of counts err less often than their level; the interval's coverage is within 0.02 of 0.95."""
    simulations, num = 2000, 60
    generator = np.random.default_rng(14)
    false_positives = covered = 0
    for _ in range(simulations):
        draw = generator.random(num)
        first, second = draw < 0.5, (draw < 0.35) | ((draw > 0.8) & (draw < 0.95))  # 0.5 each, differing on 0.3
        better = first | (draw > 0.9)  # the first with a tenth of all items more
        test, other = mcnemar(list(first), list(second)), mcnemar(list(better), list(second))
        assert test.p_value is not None
        assert other.low is not None
        assert other.high is not None
        false_positives += test.p_value < 0.05
        covered += other.low <= 0.1 <= other.high
    assert false_positives / simulations <= 0.05 + tolerance(0.05, simulations)
    assert false_positives / simulations >= 0.01
    assert covered / simulations == pytest.approx(0.95, abs=tolerance(0.95, simulations) + 0.02)


def test_holm_keeps_the_family_error_rate_of_one_test() -> None:
    """Four equal methods, five seeds, six pairs: without correction, one in six families would err."""
    simulations = 600
    generator = np.random.default_rng(15)
    uncorrected = corrected = 0
    for _ in range(simulations):
        losses = generator.normal(0, 1.0, 5) + generator.normal(0, 0.02, (4, 5))
        p_values = [paired_t(a, b).p_value for a, b in itertools.combinations(losses, 2)]
        uncorrected += any(p is not None and p < 0.05 for p in p_values)
        corrected += any(p is not None and p < 0.05 for p in holm(p_values))
    assert corrected / simulations <= 0.05 + tolerance(0.05, simulations)
    assert uncorrected / simulations > 0.12


def test_a_difference_that_is_there_is_found() -> None:
    generator = np.random.default_rng(16)
    seeds = generator.normal(2.3, 0.1, 5)
    t = paired_t(list(seeds), list(seeds + 0.05 + generator.normal(0, 0.01, 5)))
    labels, difficulty = generator.integers(4, 64, 200), generator.gamma(4.0, 0.6, 200)
    bootstrap = paired_bootstrap(
        list(difficulty), list(difficulty + 0.05 + generator.normal(0, 0.2, 200)), list(labels)
    )
    exact = mcnemar([True] * 40 + [False] * 60, [False] * 15 + [True] * 25 + [True] * 2 + [False] * 58)
    for test in (t, bootstrap, exact):
        assert test.p_value is not None
        assert test.p_value < 0.01, test
        assert test.low is not None
        assert test.high is not None
        assert test.low > 0 or test.high < 0
