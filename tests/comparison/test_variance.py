"""The variance of a difference equals hand-made cases, sums written out, scipy's t tests and Smyth's equations."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, special, stats

from loragrid.comparison.variance import (
    Components,
    components_of_methods,
    components_of_pairs,
    means_of,
    moderated,
    total_variance,
    trigamma_inverse,
)
from tests.support.made_up_scores import scores_of

Floats = NDArray[np.float64]


def components(seeds: Floats, rows: float = 1.0, cross: float = 0.0) -> Components:
    return Components(seeds=seeds, rows=np.full(len(seeds), rows), cross=np.full(len(seeds), cross))


def test_components_equal_their_sums_written_out() -> None:
    rng = np.random.default_rng(1)
    num_methods, num_seeds, num_rows = 3, 4, 30
    values = rng.normal(size=(num_methods, num_seeds, num_rows))
    weights = rng.integers(1, 9, num_rows).astype(float)
    groups = rng.integers(100, 108, num_rows)
    means = means_of(scores_of(values, weights=weights, groups=groups))
    found = components_of_pairs(means)
    names = sorted(set(groups.tolist()))
    total = sum(weights)
    for k, (a, b) in enumerate(itertools.combinations(range(num_methods), 2)):
        differences, z = [], {}
        for s in range(num_seeds):
            mean = {m: sum(weights[i] * values[m, s, i] for i in range(num_rows)) / total for m in (a, b)}
            differences.append(mean[a] - mean[b])
            for g in names:
                z[s, g] = sum(
                    weights[i] * ((values[a, s, i] - mean[a]) - (values[b, s, i] - mean[b])) / total
                    for i in range(num_rows)
                    if groups[i] == g
                )
        centre = sum(differences) / num_seeds
        assert found.seeds[k] == pytest.approx(sum((d - centre) ** 2 for d in differences) / (num_seeds - 1))
        correction = len(names) / (len(names) - 1)
        bar = {g: sum(z[s, g] for s in range(num_seeds)) / num_seeds for g in names}
        assert found.rows[k] == pytest.approx(correction * sum(value**2 for value in bar.values()))
        rest = sum((z[s, g] - bar[g]) ** 2 for s in range(num_seeds) for g in names)
        assert found.cross[k] == pytest.approx(correction * rest / (num_seeds * (num_seeds - 1)))
    by_group = [sum(weights[i] for i in range(num_rows) if groups[i] == g) for g in names]
    assert means.effective_groups == pytest.approx(sum(by_group) ** 2 / sum(w**2 for w in by_group))
    assert means.num_groups == len(names)


def test_single_methods_have_the_components_of_a_difference_from_zero() -> None:
    values = np.random.default_rng(2).normal(size=(1, 3, 12))
    own = components_of_methods(means_of(scores_of(values)))
    pair = components_of_pairs(means_of(scores_of(np.concatenate([values, np.zeros((1, 3, 12))]))))
    for name in ("seeds", "rows", "cross"):
        assert getattr(own, name) == pytest.approx(getattr(pair, name))


def test_pairs_have_twice_the_residual_mean_square_on_average() -> None:
    """PROCEDURE's s₀²: the mean variance of all pairs is twice the residual mean square of the seed x method table."""
    values = np.random.default_rng(3).normal(size=(6, 4, 10))
    table = values.mean(axis=2)
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    mean_square = (residual**2).sum() / ((6 - 1) * (4 - 1))
    assert components_of_pairs(means_of(scores_of(values))).seeds.mean() == pytest.approx(2 * mean_square)


def test_the_total_is_the_variance_of_a_simulated_difference() -> None:
    """V estimates the variance of D over new seeds and new rows, with seed, row and seed x row noise together."""
    rng = np.random.default_rng(4)
    num, shape = 4_000, (2, 5, 40)
    differences, estimates = np.empty(num), np.empty(num)
    for i in range(num):
        values = rng.normal(0, 0.05, (2, 5, 1)) + rng.normal(0, 0.3, (2, 1, 40)) + rng.normal(0, 0.5, shape)
        means = means_of(scores_of(values))
        parts = components_of_pairs(means)
        differences[i] = means.per_seed.mean(1)[0] - means.per_seed.mean(1)[1]
        estimates[i] = (parts.seeds / 5 + parts.rows - parts.cross)[0]
    truth = 2 * (0.05**2 / 5 + 0.3**2 / 40 + 0.5**2 / 200)
    assert estimates.mean() == pytest.approx(truth, abs=4 * estimates.std() / math.sqrt(num))
    assert differences.var() == pytest.approx(truth, rel=4 * math.sqrt(2 / num))


@pytest.mark.parametrize("value", [1e-4, 0.1, 1.0, 7.3, 500.0])
def test_trigamma_inverse_is_the_inverse(value: float) -> None:
    assert special.polygamma(1, trigamma_inverse(value)) == pytest.approx(value, rel=1e-10)


def test_the_prior_solves_smyths_equation() -> None:
    variances = np.array([0.2, 1.0, 9.0, 0.6, 2.0, 30.0])  # the pairs of four methods
    f = 4
    excess = np.log(variances).var(ddof=1) - special.polygamma(1, f / 2)
    root = 2 * optimize.brentq(lambda y: special.polygamma(1, y) - excess, 1e-3, 1e3, xtol=1e-14)
    prior = 1 / (1 / root + 1 / (4 * 3))
    assert prior < (4 - 2) * f
    seeds, degrees = moderated(components(variances), num_seeds=5, num_methods=4)
    assert degrees == pytest.approx(prior + f, rel=1e-9)
    shrunk = (prior * variances.mean() + f * variances) / (prior + f)
    assert seeds == pytest.approx(np.maximum(variances, shrunk))


def test_equal_variances_give_the_most_support_allowed() -> None:
    same = np.full(3, 2.0)
    # Three methods and three seeds: 1 / d₀ = 1 / (3 (3 - 2)), limited to (3 - 2) 2.
    seeds, degrees = moderated(components(same), num_seeds=3, num_methods=3)
    assert degrees == 2 + 2
    assert seeds == pytest.approx(same)
    # Five methods, three seeds: 5 (3 - 2) = 5 is below (5 - 2) 2 = 6.
    assert moderated(components(np.full(10, 2.0)), num_seeds=3, num_methods=5)[1] == 5 + 2


def test_moderation_never_lowers_a_variance() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        variances = rng.gamma(rng.uniform(0.2, 3), size=10) * rng.choice([1, 100], 10)
        seeds, degrees = moderated(components(variances), num_seeds=3, num_methods=5)
        assert (seeds >= variances).all()
        assert 2 <= degrees <= 4 * 2
        assert (seeds > variances).any()


def test_two_methods_keep_their_own_variance() -> None:
    seeds, degrees = moderated(components(np.array([3.0])), num_seeds=4, num_methods=2)
    assert (seeds.tolist(), degrees) == ([3.0], 3)


def test_a_method_trained_twice_changes_no_other_pair() -> None:
    """LoRA+ with a ratio of 1 is LoRA: the copy says nothing about how far seeds vary."""
    rng = np.random.default_rng(6)
    values = rng.normal(size=(4, 3, 20))
    copied = np.concatenate([values, values[:1]])
    without, with_copy = (components_of_pairs(means_of(scores_of(v))) for v in (values, copied))
    same = np.array([pair == (0, 4) for pair in itertools.combinations(range(5), 2)])
    assert (with_copy.seeds[same], with_copy.rows[same], with_copy.cross[same]) == (0, 0, 0)
    seeds, degrees = moderated(with_copy, 3, 5)
    assert seeds[same] == 0
    # The copy repeats pairs, so it weighs in the mean; the limits are those of four methods.
    assert degrees <= 2 + 4
    assert degrees > 2.5
    assert moderated(without, 3, 4)[1] > 2.5


def test_variances_of_zero_neither_stop_support_nor_escape_it() -> None:
    """Differences of counts can agree in all seeds by chance."""
    variances = np.array([0.0, 1.0, 1.2, 0.8, 1.1, 0.9])
    seeds, degrees = moderated(components(variances), num_seeds=3, num_methods=4)
    assert degrees > 2.3
    assert seeds[0] > 0.1
    assert moderated(components(variances * 1e-9), 3, 4)[1] == pytest.approx(degrees)


def test_satterthwaite_reduces_to_its_parts() -> None:
    seeds = np.array([3.0])
    variance, degrees = total_variance(components(seeds, rows=0.0), seeds, 6.0, 3, 100.0)
    assert (variance[0], degrees[0]) == (1.0, pytest.approx(6.0))
    variance, degrees = total_variance(components(np.zeros(1), rows=2.0), np.zeros(1), 6.0, 3, 100.0)
    assert (variance[0], degrees[0]) == (2.0, pytest.approx(99.0))
    nothing = components(np.zeros(1), rows=0.0)
    variance, degrees = total_variance(nothing, nothing.seeds, 6.0, 3, 100.0)
    assert (variance[0], degrees[0]) == (0.0, 6.0)


def test_satterthwaite_by_hand() -> None:
    # A = 6 / 3 = 2, B = 3, C = 1, f = 2, G* - 1 = 10: V = 4; A⁺ = 2 (1 + 1) = 4, V⁺ = 6.
    variance, degrees = total_variance(components(np.array([6.0]), 3.0, 1.0), np.array([6.0]), 2.0, 3, 11.0)
    assert variance[0] == pytest.approx(4.0)
    assert degrees[0] == pytest.approx(36 / (16 / 2 + 9 / 10 + 1 / 20))


@pytest.mark.parametrize(("rows", "cross", "expected"), [(1.0, 5.0, 4.0), (7.0, 5.0, 7.0), (4.5, 0.5, 8.0)])
def test_the_total_is_at_least_each_part(rows: float, cross: float, expected: float) -> None:
    seeds = np.array([12.0])  # A = 4
    assert total_variance(components(seeds, rows, cross), seeds, 2.0, 3, 50.0)[0] == pytest.approx(expected)


def test_rows_without_seed_noise_give_the_paired_t_test() -> None:
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(2, 1, 25)).repeat(3, axis=1)
    means = means_of(scores_of(rows))
    parts = components_of_pairs(means)
    variance, degrees = total_variance(parts, parts.seeds, 2.0, 3, means.effective_groups)
    reference = stats.ttest_rel(rows[0, 0], rows[1, 0])
    assert degrees[0] == pytest.approx(reference.df)
    assert (rows[0, 0] - rows[1, 0]).mean() / math.sqrt(variance[0]) == pytest.approx(reference.statistic)
