"""Holm's correction agrees with its definition and keeps the error rate of a family."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from loragrid.comparison.statistics import holm


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


def test_holm_keeps_the_family_error_rate_of_one_test() -> None:
    """Four equal methods, five seeds, six pairs: without correction, one in six families would err."""
    simulations = 600
    generator = np.random.default_rng(15)
    uncorrected = corrected = 0
    for _ in range(simulations):
        losses = generator.normal(0, 1.0, 5) + generator.normal(0, 0.02, (4, 5))
        first, second = np.triu_indices(4, 1)
        p_values = stats.ttest_rel(losses[first], losses[second], axis=1).pvalue.tolist()
        uncorrected += min(p_values) < 0.05
        corrected += any(p is not None and p < 0.05 for p in holm(p_values))
    assert corrected / simulations <= 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / simulations)
    assert uncorrected / simulations > 0.12
