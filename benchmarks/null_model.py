"""The model of noise behind `null_simulation`: seed effects, evaluation figures and scores of test rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from benchmarks.null_scenes import Scene

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Effects of S seeds: own (M, L, S) of every trial, with L rates; shared (S,) on all methods."""

    own: Floats
    shared: Floats


def per_method(scene: Scene, value: float | tuple[float, ...]) -> Floats:
    return np.broadcast_to(np.asarray(value, float), (scene.num_methods,))


def draw_seeds(scene: Scene, rng: np.random.Generator, num_seeds: int) -> Seeds:
    num_rates = len(scene.ladder)
    shape = (scene.num_methods, num_rates, num_seeds)
    z = _unit(rng, scene.seed_shape, shape)
    if scene.rates_share:
        common = _unit(rng, scene.seed_shape, (scene.num_methods, 1, num_seeds))
        z = np.sqrt(1 - scene.rates_share) * z + np.sqrt(scene.rates_share) * common
    if scene.loadings:
        loadings = per_method(scene, scene.loadings)[:, None, None]
        z = np.sqrt(1 - loadings**2) * z + loadings * _unit(rng, scene.seed_shape, (1, num_rates, num_seeds))
    steps = np.arange(num_rates) - num_rates // 2
    sd = per_method(scene, scene.seed_sd)[:, None] * per_method(scene, scene.growth)[:, None] ** steps
    own = z * sd[..., None]
    if scene.stuck:
        own = own + scene.stuck_by * (rng.random(shape) < _stuck(scene)[:, None, None])
    return Seeds(own=own, shared=rng.normal(0, scene.shared_seed_sd, num_seeds))


def _stuck(scene: Scene) -> Floats:
    """(M,): the probability that a trial of each method gets stuck."""
    methods = range(scene.num_methods) if scene.stuck_methods is None else scene.stuck_methods
    return np.where(np.isin(np.arange(scene.num_methods), list(methods)), scene.stuck, 0.0)


def _unit(rng: np.random.Generator, shape_name: str, shape: tuple[int, ...]) -> Floats:
    """Draws with mean 0 and variance 1."""
    if shape_name == "t3":
        return np.asarray(rng.standard_t(3, shape) / np.sqrt(3))
    if shape_name == "exponential":
        return np.asarray(rng.standard_exponential(shape) - 1)
    if shape_name == "lognormal":
        return np.asarray((rng.lognormal(0, 1, shape) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e))
    return rng.standard_normal(shape)


def expected_figures(scene: Scene) -> Floats:
    """(M, L): every setting's expected figure over new seeds and new rows; a loss, or an accuracy."""
    ladder = np.asarray(scene.ladder, float)
    if scene.accuracy is None:
        return ladder[None, :] + scene.stuck_by * _stuck(scene)[:, None]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    spread = np.sqrt(
        scene.row_sd**2
        + per_method(scene, scene.method_row_sd) ** 2
        + per_method(scene, scene.seed_row_sd) ** 2
        + per_method(scene, scene.seed_sd) ** 2
        + scene.shared_seed_sd**2
    )
    logits = scene.accuracy + ladder[None, :, None] + spread[:, None, None] * nodes
    return np.asarray(1 - (special.expit(logits) * weights).sum(-1) / weights.sum())


def evaluation_figures(scene: Scene, rng: np.random.Generator, seeds: Seeds) -> tuple[Floats, Floats]:
    """(figures, losses), each (M, L, S): by which settings are chosen, and which breaks ties."""
    level = np.asarray(scene.ladder, float)[None, :, None] + seeds.own + seeds.shared
    if scene.accuracy is not None:
        wrong: Floats = _wrong(scene, rng, level + scene.accuracy, scene.evaluation_rows).mean(-1)
        return 1 - wrong, level
    effective = np.sqrt(scene.evaluation_rows / np.exp(scene.weights_sd**2))
    by_method = per_method(scene, scene.method_row_sd)[:, None, None] * rng.standard_normal((*level.shape[:2], 1))
    by_seed = per_method(scene, scene.seed_row_sd)[:, None, None] * rng.standard_normal(level.shape)
    losses = level + (by_method + by_seed) / effective
    return losses, losses


def _wrong(scene: Scene, rng: np.random.Generator, logits: Floats, num_rows: int) -> Floats:
    """0 or 1 (..., N): wrong answers to new rows, for logits (M, ..., S) of the error rate."""
    scale = (slice(None), *(None,) * logits.ndim)
    difficulty = rng.normal(0, scene.row_sd, num_rows)
    by_method = rng.standard_normal((*logits.shape[:-1], 1, num_rows)) * per_method(scene, scene.method_row_sd)[scale]
    by_seed = rng.standard_normal((*logits.shape, num_rows)) * per_method(scene, scene.seed_row_sd)[scale]
    p = special.expit(logits[..., None] + difficulty + by_method + by_seed)
    wrong: Floats = (rng.random(p.shape) < p).astype(np.float64)
    return wrong


def group_numbers(scene: Scene, rng: np.random.Generator) -> NDArray[np.int64]:
    """(N,): the group of every row."""
    if scene.groups == "1-20":
        sizes = rng.integers(1, 21, scene.num_rows)
    elif scene.groups:
        sizes = np.asarray(scene.groups)
    else:
        sizes = np.ones(scene.num_rows, int)
    return np.repeat(np.arange(len(sizes)), sizes)[: scene.num_rows]


def test_scores(
    scene: Scene, rng: np.random.Generator, seeds: Seeds, rates: NDArray[np.int64], shift: float
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """(values (M, S, N), weights (N,), groups (N,)) of the settings with the indices `rates` (M,) of the ladder.

    shift: how much worse the last method is, in nats or logits.
    """
    methods = np.arange(scene.num_methods)
    level = np.asarray(scene.ladder, float)[rates][:, None] + seeds.own[methods, rates] + seeds.shared
    level[-1] += shift
    groups = group_numbers(scene, rng)
    if scene.accuracy is not None:
        return 1 - _wrong(scene, rng, level + scene.accuracy, scene.num_rows), np.ones(scene.num_rows), groups
    weights = np.maximum(4, rng.lognormal(4.3, scene.weights_sd, scene.num_rows)).astype(int).astype(float)

    def noise(shape: tuple[int, int]) -> Floats:
        own = _unit(rng, scene.row_shape, (*shape, scene.num_rows))
        if not scene.groups:
            return own
        together = _unit(rng, scene.row_shape, (*shape, int(groups[-1]) + 1))
        return np.asarray(np.sqrt(0.5) * (own + together[..., groups]))

    by_method = per_method(scene, scene.method_row_sd)[:, None, None] * noise((scene.num_methods, 1))
    by_seed = per_method(scene, scene.seed_row_sd)[:, None, None] * noise(level.shape)
    return level[..., None] + rng.normal(0, scene.row_sd, scene.num_rows) + by_method + by_seed, weights, groups


def seed_scale(scene: Scene) -> float:
    """The unit of a difference, in nats or logits: the root mean square of the methods' seed deviations."""
    return float(np.sqrt((per_method(scene, scene.seed_sd) ** 2).mean())) or 0.002
