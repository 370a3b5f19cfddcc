"""Compares methods in pairs: which differences are shown, and how far each method can be behind the best.

`compare_methods` makes claims about methods: about other seeds and other rows of the same kind.
`compare_trained_models` makes claims about the trained models only. `docs/verdict.md` defends the procedure.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from loragrid.comparison.method_comparison import ALL_PAIRS, Family, MethodComparison, MethodEstimate, PairTest
from loragrid.comparison.method_scores import Floats, MethodScores
from loragrid.comparison.noise_floor import MIN_GROUPS, MIN_SEEDS
from loragrid.comparison.pair_tests import (
    bounds_behind_best,
    differences_of,
    estimates_of,
    not_behind,
    tests_of_pairs,
    untested_pairs,
)
from loragrid.comparison.variance import (
    Components,
    Means,
    Variance,
    components_of_methods,
    components_of_pairs,
    means_of,
    moderated,
    pairs_of,
    total_variance,
)

__all__ = [
    "ALL_PAIRS",
    "Family",
    "MethodComparison",
    "MethodEstimate",
    "MethodScores",
    "PairTest",
    "compare_methods",
    "compare_trained_models",
]

FEW_GROUPS = 30
MANY_METHODS = 9
FAR_NOISIER = 3.0


def compare_methods(scores: MethodScores, family: Family = ALL_PAIRS) -> MethodComparison:
    """Test every pair of methods: does the difference hold for new seeds and new rows of the same kind?

    One test per pair with both sources of variance (`variance.total_variance`), and one correction over the family
    (Holm 1979, "A simple sequentially rejective multiple test procedure"). Nothing is claimed for fewer than three
    seeds, for fewer than ten effective groups of rows, or for a single method.

    Raises:
        ValueError: the family is against a method that is not compared.
    """
    return _compare(scores, family, "methods", MIN_SEEDS, _variance_over_seeds_and_rows)


def compare_trained_models(scores: MethodScores, family: Family = ALL_PAIRS) -> MethodComparison:
    """Test every pair of trained models: does the difference hold for new rows, with the seeds that were trained?

    The variance is the cluster-robust variance of the rows alone, with G* - 1 degrees of freedom, so one seed is
    enough. The result says nothing about methods: other seeds may change the order. It has its own correction.

    Raises:
        ValueError: the family is against a method that is not compared.
    """
    return _compare(scores, family, "trained models", 1, _variance_over_rows)


def _variance_over_seeds_and_rows(
    scores: MethodScores, means: Means, pairs: Components, methods: Components
) -> tuple[Variance, Variance]:
    num_methods, num_seeds = means.per_seed.shape
    seeds, degrees = moderated(pairs, num_seeds, num_methods)
    of_methods = methods.seeds
    if scores.seed_variances is not None:
        first, second = pairs_of(num_methods)
        seeds = np.maximum(seeds, scores.seed_variances[first] + scores.seed_variances[second])
        of_methods = np.maximum(of_methods, scores.seed_variances)
    return (
        total_variance(pairs, seeds, degrees, num_seeds, means.effective_groups),
        total_variance(methods, of_methods, num_seeds - 1, num_seeds, means.effective_groups),
    )


def _variance_over_rows(
    scores: MethodScores, means: Means, pairs: Components, methods: Components
) -> tuple[Variance, Variance]:
    degrees = means.effective_groups - 1
    return (pairs.rows, np.full(len(pairs.rows), degrees)), (methods.rows, np.full(len(methods.rows), degrees))


def _compare(
    scores: MethodScores,
    family: Family,
    claims_about: Literal["methods", "trained models"],
    fewest_seeds: int,
    variances: Callable[[MethodScores, Means, Components, Components], tuple[Variance, Variance]],
) -> MethodComparison:
    if family.kind == "against" and family.against not in scores.names:
        raise ValueError(f"against: {family.against!r} is not compared; allowed: {', '.join(scores.names)}")
    means = means_of(scores)
    num_seeds = means.per_seed.shape[1]
    pairs, methods = components_of_pairs(means), components_of_methods(means)
    refusal = _refusal(means, fewest_seeds)
    of_methods: Variance | None = None
    behind: Floats | None = None
    if refusal:
        tests = untested_pairs(scores, means, family, refusal)
    else:
        of_pairs, of_methods = variances(scores, means, pairs, methods)
        found = differences_of(scores, means, of_pairs)
        tests, behind = tests_of_pairs(scores, found, family), bounds_behind_best(scores, found)
    groups, half = means.effective_groups, num_seeds / 2
    noisy = _far_noisier(scores, pairs.seeds)
    return MethodComparison(
        claims_about=claims_about,
        pairs=tests,
        estimates=estimates_of(scores, means, of_methods, behind),
        best_group=not_behind(scores.names, tests),
        num_seeds=num_seeds,
        num_rows=len(scores.weights),
        num_groups=means.num_groups,
        effective_groups=groups,
        seed_deviation=_root(_mean(pairs.seeds) / 2 - half * _mean(pairs.cross)),
        row_deviation=_root(_mean(pairs.rows) * groups),
        row_seed_deviation=_root(_mean(pairs.cross) * groups * half),
        far_noisier=noisy,
        refusal=refusal,
        caveats=() if refusal else _caveats(scores, means, claims_about, noisy),
    )


def _refusal(means: Means, fewest_seeds: int) -> str:
    """Why nothing at all is claimed; "" if claims are possible."""
    num_methods, num_seeds = means.per_seed.shape
    if num_methods < 2:
        return "there is only one method"
    if num_seeds < fewest_seeds:
        shared = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
        return f"the methods share {shared}; a claim about methods needs {fewest_seeds}"
    if means.effective_groups < MIN_GROUPS:
        return f"the test rows count as {means.effective_groups:.1f} independent groups; a claim needs {MIN_GROUPS}"
    return ""


def _far_noisier(scores: MethodScores, seeds: Floats) -> tuple[str, ...]:
    """The methods that vary over seeds far more than the others, by their other settings or, if unknown, by the pairs.

    In the pairs: their typical deviation over seeds is three times that of the other pairs. seeds (P,): s². Medians are
    used, because every method has a pair with the noisy one; of two pairs, the smaller counts.
    """
    if scores.seed_variances is not None:
        return tuple(name for name, known in zip(scores.names, scores.seed_variances, strict=True) if known > 0)
    if len(scores.names) < 3 or not np.isfinite(seeds).all():
        return ()
    first, second = pairs_of(len(scores.names))
    noisy = []
    for method, name in enumerate(scores.names):
        mine = (first == method) | (second == method)
        own = float(np.quantile(seeds[mine], 0.5, method="lower"))
        if own > 0 and own >= FAR_NOISIER**2 * float(np.median(seeds[~mine])):
            noisy.append(name)
    return tuple(noisy)


def _caveats(scores: MethodScores, means: Means, claims_about: str, far_noisier: tuple[str, ...]) -> tuple[str, ...]:
    num_methods, num_seeds = means.per_seed.shape
    caveats = []
    if means.effective_groups < FEW_GROUPS:
        caveats.append(f"few independent rows: the test rows count as {means.effective_groups:.0f} independent groups")
    if claims_about != "methods":
        return tuple(caveats)
    if far_noisier:
        caveats.append(
            f"far more spread over seeds than the others: {', '.join(far_noisier)}; if the runs of such a method now "
            "and then end far worse than the rest, false claims are more frequent than 5 %"
        )
    if num_seeds == MIN_SEEDS and num_methods > MANY_METHODS and far_noisier:
        caveats.append(
            f"with three seeds, {num_methods} methods and one that is far noisier, an interval of one pair alone "
            "covers less than 95 %"
        )
    if num_seeds == MIN_SEEDS and num_methods > 2 and scores.seed_variances is None and not far_noisier:
        caveats.append(
            "three seeds and one setting for each method: if one of them varies far more over seeds than these three "
            "show, false claims are as frequent as 6 %"
        )
    return tuple(caveats)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _root(value: float) -> float:
    """The square root of an estimate of a variance, which chance can make negative; NaN stays NaN."""
    return math.sqrt(value) if value > 0 else value * 0
