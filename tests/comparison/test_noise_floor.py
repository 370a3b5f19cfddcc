"""The noise floor: its formula against independent values, what it refuses, and how it moves with the design."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from loragrid.comparison.noise_floor import (
    Design,
    Noise,
    more_rows_help,
    seeds_to_show,
    smallest_difference,
)
from loragrid.comparison.pairwise import MethodScores, compare_methods

BASE = Noise(seed_deviation=0.002, pair_row_deviation=0.008 * math.sqrt(2), row_seed_deviation=0.012)
FIVE = Design(num_methods=5, num_pairs=10, num_seeds=3, num_groups=209.0)


def floor(noise: Noise, design: Design) -> float:
    found = smallest_difference(noise, design)
    assert found is not None
    return found


def power_by_quadrature(noise: Noise, design: Design, difference: float, freedom: float) -> float:
    """The probability that |t| exceeds the limit, if the true difference is `difference`: noncentral t."""
    deviation = math.sqrt(
        2 * noise.seed_deviation**2 / design.num_seeds + noise.row_deviation(design.num_seeds) ** 2 / design.num_groups
    )
    limit = stats.t.isf(0.025 / design.num_pairs, freedom)
    return float(stats.nct.sf(limit, freedom, difference / deviation))


def test_floor_equals_the_simulated_scenes_figures() -> None:
    """The figures, in seed deviations, of the simulations that the formula was calibrated with."""
    assert floor(BASE, FIVE) / 0.002 == pytest.approx(4.8, abs=0.1)
    assert floor(BASE, replace(FIVE, num_seeds=5)) / 0.002 == pytest.approx(3.1, abs=0.1)
    assert floor(BASE, replace(FIVE, num_seeds=10)) / 0.002 == pytest.approx(2.3, abs=0.1)
    assert floor(BASE, replace(FIVE, num_methods=2, num_pairs=1)) / 0.002 == pytest.approx(4.1, abs=0.1)
    assert floor(BASE, replace(FIVE, num_methods=9, num_pairs=36)) / 0.002 == pytest.approx(5.0, abs=0.1)
    assert floor(BASE, replace(FIVE, num_methods=15, num_pairs=105)) / 0.002 == pytest.approx(5.1, abs=0.1)
    assert floor(BASE, replace(FIVE, num_groups=1633.0)) / 0.002 == pytest.approx(4.9, abs=0.2)


def test_floor_of_two_methods_without_row_noise_is_the_paired_t_tests() -> None:
    """Without noise of rows the floor is that of a paired t test with its own degrees of freedom."""
    noise = Noise(seed_deviation=0.01, pair_row_deviation=0.0, row_seed_deviation=0.0)
    design = Design(num_methods=2, num_pairs=1, num_seeds=10, num_groups=100.0)
    found = floor(noise, design)
    expected = (stats.t.isf(0.025, 9) + stats.t.isf(0.2, 9)) * math.sqrt(2 * 0.01**2 / 10)
    assert found == pytest.approx(expected, rel=1e-12)
    exact = optimize.brentq(lambda x: power_by_quadrature(noise, design, x, 9) - 0.8, 1e-4, 1.0)
    assert found == pytest.approx(exact, rel=0.03)


def test_floor_without_seed_noise_has_the_rows_freedom() -> None:
    noise = Noise(seed_deviation=0.0, pair_row_deviation=0.5, row_seed_deviation=0.0)
    design = Design(num_methods=3, num_pairs=3, num_seeds=3, num_groups=25.0)
    expected = (stats.t.isf(0.025 / 3, 24) + stats.t.isf(0.2, 24)) * 0.5 / 5
    assert floor(noise, design) == pytest.approx(expected, rel=1e-12)


def test_floor_falls_with_seeds_and_rows_and_rises_with_pairs() -> None:
    by_seeds = [floor(BASE, replace(FIVE, num_seeds=seeds)) for seeds in range(3, 20)]
    assert by_seeds == sorted(by_seeds, reverse=True)
    by_rows = [floor(BASE, replace(FIVE, num_groups=rows)) for rows in (10.0, 20.0, 40.0, 80.0, 160.0)]
    assert by_rows == sorted(by_rows, reverse=True)
    by_pairs = [floor(BASE, replace(FIVE, num_pairs=pairs)) for pairs in range(1, 11)]
    assert by_pairs == sorted(by_pairs)
    assert floor(BASE, replace(FIVE, num_pairs=4)) < floor(BASE, FIVE)


def test_floor_rises_with_every_part_of_the_noise() -> None:
    for part in ("seed_deviation", "pair_row_deviation", "row_seed_deviation"):
        noisier = Noise(**{**vars(BASE), part: 2 * getattr(BASE, part)})
        assert floor(noisier, FIVE) > floor(BASE, FIVE), part


def test_floor_scales_with_the_unit() -> None:
    percent = Noise(**{name: 100 * value for name, value in vars(BASE).items()})
    assert floor(percent, FIVE) == pytest.approx(100 * floor(BASE, FIVE), rel=1e-12)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_seeds": 2}, "3 seeds"),
        ({"num_seeds": 1}, "3 seeds"),
        ({"num_groups": 9.9}, "10 independent test rows"),
        ({"num_methods": 1, "num_pairs": 0}, "no pair"),
    ],
)
def test_design_that_can_claim_nothing_has_no_floor(changed: dict[str, int], words: str) -> None:
    design = replace(FIVE, **changed)
    assert words in design.obstacle
    assert smallest_difference(BASE, design) is None


def test_no_noise_leaves_no_floor() -> None:
    nothing = Noise(seed_deviation=0.0, pair_row_deviation=0.0, row_seed_deviation=0.0)
    assert smallest_difference(nothing, FIVE) == 0.0
    assert not more_rows_help(nothing, FIVE)


def test_seeds_to_show_is_the_smallest_number_that_does() -> None:
    for difference in (0.01, 0.007, 0.005, 0.004):
        num = seeds_to_show(BASE, FIVE, difference)
        assert num is not None
        assert floor(BASE, replace(FIVE, num_seeds=num)) <= difference
        assert num == 3 or floor(BASE, replace(FIVE, num_seeds=num - 1)) > difference


def test_seeds_to_show_gives_up_where_rows_are_the_limit() -> None:
    noise = replace(BASE, seed_deviation=0.0)
    few = replace(FIVE, num_groups=16.0)
    assert seeds_to_show(noise, few, 0.001) is None
    assert seeds_to_show(noise, replace(few, num_groups=5.0), 10.0) is None
    assert seeds_to_show(BASE, FIVE, 0.0025) is None
    assert seeds_to_show(BASE, FIVE, 1.0) == 3


def test_seeds_to_show_refuses_a_difference_of_zero() -> None:
    with pytest.raises(ValueError, match=r"difference: 0\.0 .*allowed: a number above 0"):
        seeds_to_show(BASE, FIVE, 0.0)


def test_more_rows_help_only_while_rows_add_a_quarter() -> None:
    noise = Noise(seed_deviation=0.002, pair_row_deviation=0.02, row_seed_deviation=0.0)
    # 2 x 0.002² / 3 / 4 is what rows may add; 0.02² over 600 groups is as much.
    assert more_rows_help(noise, replace(FIVE, num_groups=590.0))
    assert not more_rows_help(noise, replace(FIVE, num_groups=610.0))


def test_measured_noise_gives_back_its_row_deviation() -> None:
    noise = Noise.measured(seed_deviation=0.1, row_deviation=0.5, row_seed_deviation=0.3, num_seeds=3)
    assert noise.row_deviation(3) == pytest.approx(0.5)
    assert noise.row_deviation(1000) == pytest.approx(math.sqrt(0.5**2 - 2 * 0.3**2 / 3 + 2 * 0.3**2 / 1000))
    # An estimate of the seeds' part may exceed the whole; no variance is negative.
    assert Noise.measured(seed_deviation=0.1, row_deviation=0.1, row_seed_deviation=0.3, num_seeds=3) == Noise(
        seed_deviation=0.1, pair_row_deviation=0.0, row_seed_deviation=0.3
    )


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_noise_refuses_what_is_no_deviation(value: float) -> None:
    with pytest.raises(ValueError, match="seed_deviation"):
        Noise(seed_deviation=value, pair_row_deviation=0.1, row_seed_deviation=0.1)


@pytest.mark.parametrize(
    ("scene", "num_methods", "num_seeds", "num_rows"),
    [
        ("few methods", 5, 3, 256),
        ("more seeds", 5, 5, 256),
        ("two methods", 2, 3, 256),
        ("few rows", 5, 3, 64),
        ("many methods", 9, 3, 512),
    ],
)
def test_verdict_finds_a_difference_of_the_floors_size(
    scene: str, num_methods: int, num_seeds: int, num_rows: int
) -> None:
    """Measured power at the floor: the share of the worse method's pairs that the verdict itself shows."""
    generator = np.random.default_rng(zlib.crc32(scene.encode()))
    names = tuple(f"method {number}" for number in range(num_methods))
    shown = []
    for _ in range(120):
        labels = np.maximum(4, generator.lognormal(4.3, 0.45, num_rows)).round()
        design = Design(
            num_methods=num_methods,
            num_pairs=num_methods * (num_methods - 1) // 2,
            num_seeds=num_seeds,
            num_groups=float(labels.sum() ** 2 / (labels**2).sum()),
        )
        losses = (
            generator.normal(1.0, 0.3, num_rows)
            + generator.normal(0, BASE.seed_deviation, (num_methods, num_seeds, 1))
            + generator.normal(0, BASE.pair_row_deviation / math.sqrt(2), (num_methods, 1, num_rows))
            + generator.normal(0, BASE.row_seed_deviation, (num_methods, num_seeds, num_rows))
        )
        losses[-1] += floor(BASE, design)
        found = compare_methods(MethodScores(names=names, values=losses, weights=labels, groups=np.arange(num_rows)))
        shown += [test.better == test.first for test in found.pairs if test.second == names[-1]]
    assert 0.6 <= np.mean(shown) <= 0.92


def test_noise_of_a_simulated_sweep_is_measured_without_bias() -> None:
    """The deviations of the verdict's own result are those that the simulation was made with."""
    generator = np.random.default_rng(zlib.crc32(b"measured noise"))
    squares = []
    for _ in range(60):
        losses = (
            generator.normal(1.0, 0.3, 256)
            + generator.normal(0, BASE.seed_deviation, (5, 3, 1))
            + generator.normal(0, BASE.pair_row_deviation / math.sqrt(2), (5, 1, 256))
            + generator.normal(0, BASE.row_seed_deviation, (5, 3, 256))
        )
        scores = MethodScores(names=tuple("abcde"), values=losses, weights=np.ones(256), groups=np.arange(256))
        found = compare_methods(scores)
        noise = Noise.measured(
            seed_deviation=found.seed_deviation,
            row_deviation=found.row_deviation,
            row_seed_deviation=found.row_seed_deviation,
            num_seeds=found.num_seeds,
        )
        squares.append([value**2 for value in vars(noise).values()])
    measured = np.sqrt(np.mean(squares, axis=0))
    assert measured == pytest.approx(list(vars(BASE).values()), rel=0.1)
