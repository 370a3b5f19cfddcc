"""The variance of a difference of two methods over new seeds and new test rows, and its degrees of freedom.

Symbols of `docs/verdict.md`: M methods, S seeds, N rows in G groups, P pairs; z is what a group adds to a mean, s² the
variance of a pair's difference over seeds, A, B and C the shares of seeds, rows and seed x row in the variance V.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from loragrid.comparison.method_scores import Floats, MethodScores

Variance = tuple[Floats, Floats]
"""Variances (K,) and their degrees of freedom (K,)."""

ROUNDING = 1e-12
"""Deviations below this fraction of a method's largest value are rounding, and count as 0."""
ZERO_OFFSET = 1e-5
NO_EXCESS = 1e-4
"""An excess spread of logarithmic variances below this value cannot be told from 0."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variance components of K differences (the pairs, or the single methods), each an array (K,).

    seeds: s², the variance over seeds of the trial's mean; NaN for one seed.
    rows: B, the cluster-robust variance of the mean over seeds that the choice of rows causes.
    cross: C, the share of seed x row noise, which seeds / S and rows both contain; NaN for one seed.
    """

    seeds: Floats
    rows: Floats
    cross: Floats


@dataclass(frozen=True, kw_only=True)
class Means:
    """What the rows say, summed over groups.

    per_seed (M, S): every trial's weighted mean. added (M, S, G): what a group adds to the trial's mean, around 0.
    rates (M, G): a group's mean over its rows and seeds. size (M,): the largest absolute value of a method.
    effective_groups: (Σ W_g)² / Σ W_g², with W_g the weight of a group; G if all groups have the same weight.
    """

    per_seed: Floats
    added: Floats
    rates: Floats
    size: Floats
    effective_groups: float

    @property
    def num_groups(self) -> int:
        return int(self.added.shape[2])


def means_of(scores: MethodScores) -> Means:
    """Weighted means and the linearised share of every group: z[m, s, g] = Σ_{i in g} w_i (y[m, s, i] - ȳ[m, s]) / W.

    The linearisation of a ratio of sums and the effective number of groups follow Cameron and Miller (2015, "A
    practitioner's guide to cluster-robust inference", sections II and VI).
    """
    weights, total = scores.weights, scores.weights.sum()
    per_seed = scores.values @ weights / total
    weighted = scores.values * weights
    added = (scores.values - per_seed[..., None]) * weights / total
    numbers, position = np.unique(scores.groups, return_inverse=True)
    if len(numbers) < len(position):
        order = np.argsort(position, kind="stable")
        starts = np.flatnonzero(np.diff(position[order], prepend=-1))
        added = np.add.reduceat(added[..., order], starts, axis=-1)
        weighted = np.add.reduceat(weighted[..., order], starts, axis=-1)
        weights = np.add.reduceat(weights[order], starts)
    return Means(
        per_seed=per_seed,
        added=added,
        rates=weighted.mean(axis=1) / weights,
        size=np.abs(scores.values).max(axis=(1, 2)),
        effective_groups=float(weights.sum() ** 2 / (weights**2).sum()),
    )


def pairs_of(num_methods: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The first and the second method of every pair, in the order of `itertools.combinations`."""
    first, second = np.triu_indices(num_methods, 1)
    return first, second


def components_of_pairs(means: Means) -> Components:
    """The components of every pair's difference. Differences are formed first, so that equal rows cancel exactly."""
    num_methods = len(means.per_seed)
    parts = [
        _components(
            means.per_seed[a] - means.per_seed[a + 1 :],
            means.added[a] - means.added[a + 1 :],
            np.maximum(means.size[a], means.size[a + 1 :]),
        )
        for a in range(num_methods - 1)
    ]
    return Components(
        seeds=np.concatenate([np.empty(0), *(part.seeds for part in parts)]),
        rows=np.concatenate([np.empty(0), *(part.rows for part in parts)]),
        cross=np.concatenate([np.empty(0), *(part.cross for part in parts)]),
    )


def components_of_methods(means: Means) -> Components:
    """The components of every single method's mean."""
    return _components(means.per_seed, means.added, means.size)


def _components(per_seed: Floats, added: Floats, size: Floats) -> Components:
    """per_seed (K, S), added (K, S, G), size (K,): the components (K,).

    s² = Var_s(per_seed), B = G / (G - 1) Σ_g z̄_g² and C = G / (G - 1) Σ_g Σ_s (z_sg - z̄_g)² / (S (S - 1)): the
    cluster-robust variances by seed, by group, and by both (Cameron, Gelbach and Miller 2011, "Robust inference with
    multiway clustering", equation 2.11).
    """
    num_seeds, num_groups = added.shape[1:]
    correction = num_groups / (num_groups - 1) if num_groups > 1 else np.nan
    mean = added.mean(axis=1)
    rows = correction * np.einsum("kg,kg->k", mean, mean)
    rounding = (ROUNDING * size) ** 2
    if num_seeds == 1:
        nothing = np.full(len(rows), np.nan)
        return Components(seeds=nothing, rows=np.where(rows > rounding, rows, 0), cross=nothing)
    seeds = per_seed.var(axis=1, ddof=1)
    rest = (added - mean[:, None]).reshape(len(rows), -1)
    cross = correction * np.einsum("kg,kg->k", rest, rest) / (num_seeds * (num_seeds - 1))
    return Components(
        seeds=np.where(seeds > rounding, seeds, 0),
        rows=np.where(rows > rounding, rows, 0),
        cross=np.where(cross > rounding, cross, 0),
    )


def moderated(pairs: Components, num_seeds: int, num_methods: int) -> tuple[Floats, float]:
    """(s̃² (P,), f̃): the pairs' variances over seeds, each supported by all others, and their degrees of freedom.

    Empirical Bayes after Smyth (2004, "Linear models and empirical Bayes methods", section 6.2) with two changes, both
    explained in `docs/verdict.md`: d₀ is limited, because few variances cannot show that all are equal, and only small
    variances are moved, so that a pair keeps its own variance if that is larger.

        s̃² = max(s², (d₀ s₀² + f s²) / (d₀ + f)),  f̃ = d₀ + f,  f = S - 1,  s₀² = mean of s² over the pairs

    Pairs that are equal in every seed and row (one method trained twice) say nothing about seeds and are left out of
    s₀² and d₀.
    """
    f = num_seeds - 1
    same = (pairs.seeds == 0) & (pairs.rows == 0) & (pairs.cross == 0)
    own = pairs.seeds[~same]
    num_different = num_methods - _num_repeated(same, num_methods)
    if num_different < 3 or not own.any():
        return pairs.seeds, float(f)
    limit = num_different * (num_seeds - 2)  # fitted in simulation, not derived
    prior = min(1 / (1 / _prior_degrees(own, f) + 1 / limit), (num_different - 2) * f)
    supported = (prior * own.mean() + f * pairs.seeds) / (prior + f)
    return np.where(same, pairs.seeds, np.maximum(pairs.seeds, supported)), prior + f


def _num_repeated(same: NDArray[np.bool_], num_methods: int) -> int:
    """The number of methods that equal an earlier one in every seed and row. same (P,)."""
    _, second = pairs_of(num_methods)
    return len(np.unique(second[same]))


def _prior_degrees(variances: Floats, f: int) -> float:
    """Smyth's moment estimate d̂ of the prior degrees of freedom: trigamma(d̂ / 2) = Var(ln s²) - trigamma(f / 2).

    Infinite if the logarithms spread no more than variances with f degrees of freedom that estimate one value. As in
    limma's `fitFDist`, variances below 1e-5 of their median (differences of counts can agree in all seeds) are raised
    to it; the mean stands in for a median of 0.
    """
    middle = float(np.median(variances)) or float(variances.mean())
    logarithms = np.log(np.maximum(variances, ZERO_OFFSET * middle))
    excess = float(logarithms.var(ddof=1) - special.zeta(2, f / 2))
    return np.inf if excess <= NO_EXCESS else 2 * trigamma_inverse(excess)


def trigamma_inverse(value: float) -> float:
    """y with trigamma(y) = value, for a positive value: Newton's method on 1 / trigamma (Smyth 2004, appendix).

    trigamma(y) is the Hurwitz zeta function ζ(2, y), and its derivative is -2 ζ(3, y).
    """
    y = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(special.zeta(2, y))
        step = trigamma * (1 - trigamma / value) / (-2 * float(special.zeta(3, y)))
        y += step
        if abs(step) < 1e-14 * y:
            break
    return y


def total_variance(parts: Components, seeds: Floats, f: float, num_seeds: int, effective_groups: float) -> Variance:
    """(V (K,), ν (K,)): the variance of a mean over new seeds and new rows, and its degrees of freedom.

    seeds (K,): the moderated variance s̃² over seeds, with f degrees of freedom. A = s̃² / S.

        V = max(A + B - C, A, B)
        ν = V⁺² / (A⁺² / f + B² / (G* - 1) + C² / ((G* - 1) (S - 1))), at least min(f, G* - 1)

    V is the variance of two-way clustering (Cameron, Gelbach and Miller 2011, equation 2.11); the maximum keeps it
    positive. ν is Satterthwaite's (1946, "An approximate distribution of estimates of variance components").
    A⁺ = A (1 + √(2 / f)) is A raised by its own standard error, and V⁺ is V with A⁺. Without it, seeds that agree by
    chance would give a small variance and, because the rows then seem to dominate, many degrees of freedom.
    """
    from_seeds, over_rows = seeds / num_seeds, effective_groups - 1
    variance = _combined(from_seeds, parts)
    raised = from_seeds * (1 + np.sqrt(2 / f))
    spread = raised**2 / f + parts.rows**2 / over_rows + parts.cross**2 / (over_rows * (num_seeds - 1))
    lowest = float(min(f, over_rows))
    degrees = np.divide(_combined(raised, parts) ** 2, spread, out=np.full(len(spread), lowest), where=spread > 0)
    return variance, np.maximum(degrees, lowest)


def _combined(from_seeds: Floats, parts: Components) -> Floats:
    combined: Floats = np.maximum.reduce([from_seeds + parts.rows - parts.cross, from_seeds, parts.rows])
    return combined
