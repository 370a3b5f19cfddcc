"""Accuracies are compared like losses; their intervals stay within 0 and 1; few differing answers are refused."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from loragrid.comparison.pairwise import compare_methods
from loragrid.comparison.proportions import proportion_interval, share_bound
from tests.support.made_up_scores import pair, scores_of

Floats = NDArray[np.float64]


def answers(seed: int, shape: tuple[int, int, int], rate: float) -> Floats:
    return (np.random.default_rng(seed).random(shape) < rate).astype(float)


def test_proportions_that_hardly_differ_are_refused_and_bounded() -> None:
    values = answers(16, (1, 3, 200), 0.9).repeat(3, axis=0)
    values[1, :, :4] = 1 - values[1, :, :4]
    values[2, 0, :40] = 1 - values[2, 0, :40]
    found = compare_methods(scores_of(values, is_proportion=True, higher_is_better=True))
    few = pair(found, "a", "b")
    assert few.refusal == "the rates differ in 4 of 200 groups of rows; a claim needs 10"
    assert (few.p_value, few.p_adjusted, few.is_shown) == (None, None, False)
    most, none = (stats.binomtest(k, 200).proportion_ci(0.95, "exact").high for k in (4, 0))
    assert few.pair_high >= most
    assert few.pair_low <= -none
    assert pair(found, "a", "c").refusal == ""
    assert pair(found, "a", "c").p_value is not None
    # Two methods with the same answers are not said to be equal: the bound is Clopper and Pearson's of 0 in 200.
    equal = compare_methods(scores_of(values[[0, 0]], is_proportion=True, higher_is_better=True))
    assert [method.behind for method in equal.estimates] == pytest.approx([1 - 0.05 ** (1 / 200)] * 2)


def test_a_refused_pair_still_counts_in_the_correction() -> None:
    values = answers(17, (3, 3, 300), 0.5)
    values[1] = values[0]
    values[2] = np.maximum(values[2], answers(18, (1, 3, 300), 0.3)[0])
    found = compare_methods(scores_of(values, is_proportion=True, higher_is_better=True))
    assert pair(found, "a", "b").refusal
    smallest = min(test.p_value for test in found.pairs if test.p_value is not None)
    assert min(test.p_adjusted for test in found.pairs if test.p_adjusted is not None) == pytest.approx(3 * smallest)


def test_always_right_against_always_wrong_is_bounded_only() -> None:
    values = np.stack([np.ones((3, 50)), np.zeros((3, 50))])
    found = compare_methods(scores_of(values, is_proportion=True, higher_is_better=True))
    assert found.pairs[0].refusal
    assert (found.pairs[0].difference, found.pairs[0].high) == (1, 1)
    assert found.estimates[0].high == 1
    assert found.estimates[0].low == pytest.approx(0.9, abs=0.06)
    assert found.estimates[1].low == 0


def test_the_interval_of_independent_answers_is_clopper_and_pearsons() -> None:
    p = np.array([0.97, 0.5, 0.01])
    low, high = proportion_interval(p, p * (1 - p) / 300, np.full(3, 1e12), 300, 0.025)
    for i, count in enumerate((291, 150, 3)):
        exact = stats.binomtest(count, 300).proportion_ci(0.95, "exact")
        assert (low[i], high[i]) == pytest.approx((exact.low, exact.high), rel=1e-5)
    assert share_bound(np.array([0.0, 3.0]), 64, 0.025) == pytest.approx(
        [stats.binomtest(k, 64).proportion_ci(0.95, "exact").high for k in (0, 3)]
    )


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5, 0.97, 1.0])
def test_intervals_of_proportions_stay_within_0_and_1(rate: float) -> None:
    for seed in range(20):
        values = answers(seed, (3, 3, 16), rate)
        found = compare_methods(scores_of(values, is_proportion=True, higher_is_better=True))
        for method in found.estimates:
            assert method.low is not None
            assert method.high is not None
            assert 0 <= method.low <= method.mean <= method.high <= 1
            assert method.high - method.low > 0.1
