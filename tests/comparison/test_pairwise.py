"""Tests, intervals and bounds of pairs agree with scipy and with each other; what cannot be claimed is refused."""

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from loragrid.comparison.pairwise import (
    Family,
    PairTest,
    compare_methods,
    compare_trained_models,
)
from tests.support.made_up_scores import pair, scores_of

Floats = NDArray[np.float64]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sweep(seed: int, num_methods: int = 4, num_seeds: int = 3, num_rows: int = 40, spread: float = 0.1) -> Floats:
    """Losses with method, seed, row and seed x row effects."""
    rng = np.random.default_rng(seed)
    level = np.linspace(0, 0.5, num_methods)[:, None, None] + rng.normal(0, spread, (num_methods, num_seeds, 1))
    rows = rng.normal(0, 1, num_rows) + rng.normal(0, 0.2, (num_methods, 1, num_rows))
    return np.asarray(level + rows + rng.normal(0, 0.3, (num_methods, num_seeds, num_rows)))


def numbers(test: PairTest) -> list[float]:
    return [value for value in dataclasses.asdict(test).values() if isinstance(value, float)]


def test_seeds_without_row_noise_give_scipys_paired_t() -> None:
    per_seed = np.array([[2.31, 2.35, 2.29, 2.40], [2.36, 2.37, 2.33, 2.45]])
    found = compare_methods(scores_of(np.repeat(per_seed[:, :, None], 12, axis=2)))
    reference = stats.ttest_rel(*per_seed)
    interval = reference.confidence_interval(0.95)
    (test,) = found.pairs
    assert test.p_value == pytest.approx(reference.pvalue)
    assert test.p_adjusted == test.p_value
    assert test.degrees_of_freedom == pytest.approx(3)
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high))
    assert (test.pair_low, test.pair_high) == (test.low, test.high)
    assert found.row_deviation == found.row_seed_deviation == 0
    assert found.seed_deviation == pytest.approx((per_seed[0] - per_seed[1]).std(ddof=1) / math.sqrt(2))


def test_rows_without_seed_noise_give_scipys_paired_t() -> None:
    rows = np.random.default_rng(1).normal(size=(2, 30)) + np.array([[0.0], [0.7]])
    found = compare_methods(scores_of(np.repeat(rows[:, None], 3, axis=1)))
    reference = stats.ttest_rel(rows[0], rows[1])
    assert found.pairs[0].p_value == pytest.approx(reference.pvalue)
    assert found.row_deviation == pytest.approx((rows[0] - rows[1]).std(ddof=1))
    assert found.seed_deviation == 0


def test_groups_of_equal_rows_count_as_one_row() -> None:
    rows = np.random.default_rng(2).normal(size=(2, 15))
    repeated = np.repeat(rows, 4, axis=1)
    shuffled = np.random.default_rng(3).permutation(60)
    groups = np.repeat(np.arange(15), 4)[shuffled] * 7 - 3
    found = compare_methods(scores_of(np.repeat(repeated[:, None, shuffled], 3, axis=1), groups=groups))
    assert found.pairs[0].p_value == pytest.approx(stats.ttest_rel(rows[0], rows[1]).pvalue)
    assert (found.num_rows, found.num_groups) == (60, 15)
    assert found.effective_groups == pytest.approx(15)


def test_three_methods_by_hand() -> None:
    """Seed effects at 120 degrees have equal pair variances: d₀ is at its limit of 2, f̃ is 4."""
    effects = np.array([[1, 0, -1], [-1 / 2, 1, -1 / 2], [0, 0, 0]], dtype=float)
    axis1, axis2 = np.array([1, -1, 0]) / math.sqrt(2), np.array([1, 1, -2]) / math.sqrt(6)
    angles = np.array([0, 2, 4]) * math.pi / 3
    effects = np.cos(angles)[:, None] * axis1 + np.sin(angles)[:, None] * axis2
    per_seed = effects + np.array([0, 2, 5])[:, None]
    found = compare_methods(scores_of(np.repeat(per_seed[:, :, None], 10, axis=2)))
    variance = 3 / 2  # a pair's effects are √3 apart: Σ d² / (S - 1)
    p_values = {}
    for test, difference in zip(found.pairs, (-2, -5, -3), strict=True):
        assert test.difference == pytest.approx(difference)
        assert test.standard_error == pytest.approx(math.sqrt(variance / 3))
        assert test.degrees_of_freedom == pytest.approx(4)
        p_values[test.first + test.second] = 2 * stats.t.sf(abs(difference) / math.sqrt(variance / 3), 4)
        assert test.p_value == pytest.approx(p_values[test.first + test.second])
        half = stats.t.ppf(1 - 0.025 / 3, 4) * math.sqrt(variance / 3)
        assert (test.low, test.high) == pytest.approx((difference - half, difference + half))
    # Holm: the smallest p times 3, the next times 2, the largest times 1, never falling.
    assert pair(found, "a", "c").p_adjusted == pytest.approx(3 * p_values["ac"])
    assert pair(found, "b", "c").p_adjusted == pytest.approx(2 * p_values["bc"])
    assert pair(found, "a", "b").p_adjusted == pytest.approx(max(2 * p_values["bc"], p_values["ab"]))
    # Hsu: c is at most 5 + t behind a; t is one-sided, 0.05 shared by the two rivals.
    bound = stats.t.ppf(1 - 0.05 / 2, 4) * math.sqrt(variance / 3)
    assert [method.behind for method in found.estimates] == pytest.approx([0, 2 + bound, 5 + bound])
    assert found.best_group == ("a",)
    assert [test.better for test in found.pairs] == ["a", "a", "b"]
    assert found.seed_deviation == pytest.approx(math.sqrt(variance / 2))


def test_a_figure_that_should_be_high_mirrors_a_loss() -> None:
    values = sweep(4, num_seeds=5)
    loss, figure = compare_methods(scores_of(values)), compare_methods(scores_of(-values, higher_is_better=True))
    assert [test.better for test in loss.pairs] == [test.better for test in figure.pairs]
    assert any(test.better for test in loss.pairs)
    assert loss.best_group == figure.best_group
    for a, b in zip(loss.estimates, figure.estimates, strict=True):
        assert (a.mean, a.behind) == pytest.approx((-b.mean, b.behind))


@pytest.mark.parametrize("seed", range(5))
def test_scale_shift_and_order_change_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    values = sweep(seed, num_methods=5, num_seeds=4)
    weights, groups = rng.integers(1, 30, 40).astype(float), rng.integers(0, 25, 40)
    plain = compare_methods(scores_of(values, weights=weights, groups=groups))
    rows, seeds = rng.permutation(40), rng.permutation(4)
    same = [
        compare_methods(scores_of(values[:, :, rows], weights=weights[rows], groups=groups[rows])),
        compare_methods(scores_of(values[:, seeds], weights=weights, groups=groups)),
        compare_methods(scores_of(values, weights=weights * 17, groups=900 - 3 * groups)),
        compare_methods(scores_of(values + rng.normal(0, 9, (1, 4, 1)), weights=weights, groups=groups)),
    ]
    for other in same:
        for a, b in zip(plain.pairs, other.pairs, strict=True):
            assert numbers(a) == pytest.approx(numbers(b), rel=1e-7)
    larger = compare_methods(scores_of(values * 1e3, weights=weights, groups=groups))
    for a, b in zip(plain.pairs, larger.pairs, strict=True):
        assert (a.p_value, a.degrees_of_freedom) == pytest.approx((b.p_value, b.degrees_of_freedom))
        assert (a.low * 1e3, a.high * 1e3) == pytest.approx((b.low, b.high))
    order = rng.permutation(5)
    names = tuple("abcde"[i] for i in order)
    moved = compare_methods(scores_of(values[order], names=names, weights=weights, groups=groups))
    for x, y in itertools.combinations("abcde", 2):
        first, second = (x, y) if names.index(x) < names.index(y) else (y, x)
        assert pair(moved, first, second).p_adjusted == pytest.approx(pair(plain, x, y).p_adjusted)
    assert sorted(moved.best_group) == sorted(plain.best_group)


def test_a_shift_of_all_methods_row_by_row_changes_no_pair() -> None:
    values = sweep(6)
    shifted = values + np.random.default_rng(7).normal(0, 50, 40)
    for a, b in zip(compare_methods(scores_of(values)).pairs, compare_methods(scores_of(shifted)).pairs, strict=True):
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-6)


def test_interval_and_p_value_agree() -> None:
    for seed in range(30):
        for test in compare_methods(scores_of(sweep(seed, num_seeds=5))).pairs:
            assert (test.pair_low > 0 or test.pair_high < 0) == (test.p_value is not None and test.p_value < 0.05)
            if test.low > 0 or test.high < 0:  # Bonferroni's interval excludes 0, and Holm is never stricter
                assert test.is_shown
            assert test.low <= test.pair_low <= test.difference <= test.pair_high <= test.high


def test_a_family_against_one_method_leaves_the_other_pairs_out() -> None:
    values = sweep(8, num_seeds=5)
    every, against = (
        compare_methods(scores_of(values)),
        compare_methods(scores_of(values), Family(kind="against", against="b")),
    )
    assert [test.in_family for test in against.pairs] == ["b" in (test.first, test.second) for test in every.pairs]
    for a, b in zip(every.pairs, against.pairs, strict=True):
        assert a.p_value == b.p_value
        assert (b.p_adjusted is None, b.low == b.pair_low) == (not b.in_family, not b.in_family)
        assert b.high <= a.high
    p_values = sorted(test.p_value or 0 for test in against.pairs if test.in_family)
    assert min(test.p_adjusted for test in against.pairs if test.p_adjusted is not None) == pytest.approx(
        3 * p_values[0]
    )
    with pytest.raises(ValueError, match="'z' is not compared; allowed: a, b, c, d"):
        compare_methods(scores_of(values), Family(kind="against", against="z"))


def test_equal_methods_are_not_told_apart() -> None:
    values = sweep(9, num_methods=1).repeat(3, axis=0)
    found = compare_methods(scores_of(values))
    assert [(test.p_value, test.low, test.high, test.refusal) for test in found.pairs] == [(1, 0, 0, "")] * 3
    assert found.best_group == ("a", "b", "c")
    assert [method.behind for method in found.estimates] == [0, 0, 0]


def test_a_constant_difference_is_no_evidence() -> None:
    values = sweep(10, num_methods=1).repeat(2, axis=0)
    found = compare_methods(scores_of(values + np.array([0, 0.3])[:, None, None]))
    (test,) = found.pairs
    assert test.p_value is None
    assert not test.is_shown
    assert (test.low, test.high) == (-math.inf, math.inf)
    assert "same in every seed and row" in test.refusal
    assert [method.behind for method in found.estimates] == [None, None]
    flat = compare_methods(scores_of(np.full((2, 3, 12), 0.1) + np.array([0, 0.3])[:, None, None]))
    assert flat.pairs[0].p_value is None


def test_a_method_without_seed_noise_is_compared() -> None:
    values = sweep(11)
    values[2] = values[2, :1]
    found = compare_methods(scores_of(values))
    assert not found.refusal
    assert all(0 < test.standard_error < math.inf for test in found.pairs)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 2, 40), "the methods share 2 seeds; a claim about methods needs 3"),
        ((3, 1, 40), "the methods share 1 seed;"),
        ((3, 3, 9), "the test rows count as 9.0 independent groups; a claim needs 10"),
        ((1, 3, 40), "there is only one method"),
        ((2, 3, 1), "the test rows count as 1.0 independent groups"),
    ],
)
def test_too_few_seeds_rows_or_methods_are_refused(shape: tuple[int, int, int], message: str) -> None:
    found = compare_methods(scores_of(np.random.default_rng(0).normal(size=shape)))
    assert found.refusal.startswith(message)
    assert len(found.pairs) == math.comb(shape[0], 2)
    for test in found.pairs:
        assert (test.p_value, test.p_adjusted, test.low, test.better, test.refusal) == (
            None,
            None,
            -math.inf,
            "",
            found.refusal,
        )
    assert found.best_group == scores_of(np.zeros(shape)).names
    assert all(
        method.low is None and method.behind is None and math.isfinite(method.mean) for method in found.estimates
    )
    assert found.caveats == ()


def test_few_groups_are_a_caveat() -> None:
    values = sweep(12, num_rows=60, num_seeds=4)
    assert compare_methods(scores_of(values)).caveats == ()
    (caveat,) = compare_methods(scores_of(values, groups=np.arange(60) // 3)).caveats
    assert caveat == "few independent rows: the test rows count as 20 independent groups"


def test_one_far_noisier_method_among_many_is_a_caveat() -> None:
    spread = np.full((11, 1, 1), 0.01)
    spread[4] = 0.2
    effects = np.random.default_rng(13).normal(size=(11, 3, 1)) * spread
    values = effects + 1e-3 * np.random.default_rng(14).normal(size=(11, 3, 50))
    found = compare_methods(scores_of(values))
    assert found.far_noisier == ("e",)
    assert found.caveats[0].startswith("far more spread over seeds than the others: e; if the runs of such a method")
    assert found.caveats[1].startswith("with three seeds, 11 methods and one that is far noisier")
    assert len(compare_methods(scores_of(values[:9])).caveats) == 1
    assert compare_methods(scores_of(values[:9])).far_noisier == ("e",)
    even = compare_methods(scores_of(effects / spread * 0.01 + values - effects))
    assert even.far_noisier == ()
    assert [caveat[:36] for caveat in even.caveats] == ["three seeds and one setting for each"]
    known = np.zeros(11)
    assert compare_methods(scores_of(effects / spread * 0.01, seed_variances=known)).caveats == ()
    assert compare_trained_models(scores_of(effects / spread * 0.01)).caveats == ()


def test_trained_models_are_compared_over_rows_alone() -> None:
    values = sweep(15, num_methods=2, num_seeds=1)
    reference = stats.ttest_rel(values[0, 0], values[1, 0])
    found = compare_trained_models(scores_of(values))
    assert found.claims_about == "trained models"
    assert found.pairs[0].p_value == pytest.approx(reference.pvalue)
    assert found.pairs[0].degrees_of_freedom == pytest.approx(39)
    own = stats.ttest_1samp(values[0, 0], 0).confidence_interval(0.95)
    assert (found.estimates[0].low, found.estimates[0].high) == pytest.approx((own.low, own.high))
    assert math.isnan(found.seed_deviation)
    seeds = sweep(15, num_methods=3, num_seeds=4, spread=5.0)
    models, methods = compare_trained_models(scores_of(seeds)), compare_methods(scores_of(seeds))
    assert sum(test.is_shown for test in models.pairs) > sum(test.is_shown for test in methods.pairs)
    assert methods.claims_about == "methods"


@pytest.mark.parametrize(("shape", "limit_ms"), [((5, 3, 256), 2), ((15, 10, 2000), 50)])
def test_a_comparison_takes_milliseconds(shape: tuple[int, int, int], limit_ms: float) -> None:
    scores = scores_of(np.random.default_rng(0).normal(size=shape))
    used = []
    for _ in range(10):
        start = time.process_time()
        compare_methods(scores)
        used.append(time.process_time() - start)
    assert min(used) < limit_ms / 1000
