"""Costs are different only where their spreads are apart; a busy machine's times are not compared."""

import itertools
import random
from typing import Any

import pytest

from loragrid.comparison.costs import (
    BUSY_LOAD,
    ENOUGH_REPEATS,
    STEP_TIME,
    Cost,
    are_apart,
    are_same,
    cheapest,
    cost_of,
    is_lower,
    why_not_compared,
)
from loragrid.comparison.pareto import pareto_front
from loragrid.trials.tags import COST_SHAPE_TAG
from tests.support.comparisons import made_up_comparison


def timed(low: float, high: float, shape: str = "", load: float | None = 1.0) -> Cost:
    shapes = frozenset({shape} - {""})
    return Cost(median=(low + high) / 2, low=low, high=high, shapes=shapes, load=load)


def measured(trial_id: str, median: float, *, repeats: float | None = 5, **more: Any) -> dict[str, Any]:
    """A trial's row; `repeats` None: recorded before spreads were."""
    row: dict[str, Any] = {"trial_id": trial_id, "method": trial_id, STEP_TIME: median}
    if repeats is not None:
        row |= {"time/step_low_seconds": 0.9 * median, "time/step_high_seconds": 1.2 * median}
        row |= {"time/measure_repeats": repeats, "time/measure_load": 1.0}
    return row | more


def test_costs_are_apart_where_their_ranges_do_not_overlap() -> None:
    assert are_apart(timed(1.0, 1.2), timed(1.3, 1.4))
    assert not are_apart(timed(1.0, 1.3), timed(1.3, 1.4))
    assert not are_apart(timed(1.0, 2.0), timed(1.3, 1.4))
    assert is_lower(timed(1.0, 1.2), timed(1.3, 1.4))
    assert not is_lower(timed(1.3, 1.4), timed(1.0, 1.2))


def test_exact_costs_are_apart_where_they_differ() -> None:
    assert are_apart(Cost.exact(1000.0), Cost.exact(1001.0))
    assert are_same(Cost.exact(1000.0), Cost.exact(1000.0))
    assert not are_apart(Cost.exact(1000.0), Cost.exact(1000.0))


def test_two_measurements_of_one_shape_are_never_apart() -> None:
    """LoRA and LoRA+ may be measured by two workers."""
    one, other = timed(1.0, 1.1, "lora"), timed(2.0, 2.1, "lora")
    assert are_same(one, other)
    assert not are_apart(one, other)
    assert are_apart(one, timed(2.0, 2.1, "vera"))


def test_a_cost_of_unknown_spread_is_apart_from_nothing() -> None:
    unknown = Cost(median=1.0, low=None, high=None)
    assert not are_apart(unknown, timed(5.0, 6.0))
    assert not are_apart(unknown, unknown)
    assert not are_same(unknown, unknown)


def test_equal_times_are_rarely_told_apart() -> None:
    """2 of the 252 orders of five and five repeats leave ranges without overlap."""
    orders = list(itertools.combinations(range(10), ENOUGH_REPEATS))
    apart = 0
    for mine in orders:
        other = [place for place in range(10) if place not in mine]
        apart += are_apart(timed(min(mine), max(mine)), timed(min(other), max(other)))
    assert (apart, len(orders)) == (2, 252)


def test_a_settings_cost_covers_the_measurements_of_its_seeds() -> None:
    rows = [measured("a", 1.0), measured("b", 1.0), measured("c", 1.4)]
    tags = {trial_id: {COST_SHAPE_TAG: "lora"} for trial_id in "abc"}
    comparison = made_up_comparison(rows, {}, tags=tags)
    cost = cost_of(comparison, ["a", "b", "c"], STEP_TIME)
    assert cost == Cost(median=1.0, low=0.9, high=1.2 * 1.4, shapes=frozenset({"lora"}), load=1.0)
    assert cost_of(comparison, ["a"], "memory/saved_activation_bytes") is None
    assert cost_of(comparison, [], STEP_TIME) is None


def test_counts_of_one_shape_are_compared_as_counts() -> None:
    """A shape stands for its measurements. Parameters are counted for every trial."""
    rows = [
        {"trial_id": name, "method": name, "parameters/trainable": count, "memory/peak_allocated_bytes": peak}
        for name, count, peak in (("a", 10, 100), ("b", 11, 101))
    ]
    tags = {trial_id: {COST_SHAPE_TAG: "lora"} for trial_id in "ab"}
    comparison = made_up_comparison(rows, {}, tags=tags)

    def costs(key: str) -> list[Cost]:
        found = [cost_of(comparison, [name], key) for name in "ab"]
        return [cost for cost in found if cost is not None]

    assert are_apart(*costs("parameters/trainable"))
    assert are_same(*costs("memory/peak_allocated_bytes"))


@pytest.mark.parametrize("repeats", [None, 1, 4])
def test_a_few_repeats_show_no_spread(repeats: float | None) -> None:
    cost = cost_of(made_up_comparison([measured("a", 1.0, repeats=repeats)], {}), ["a"], STEP_TIME)
    assert cost is not None
    assert (cost.median, cost.low, cost.high) == (1.0, None, None)
    assert "fewer than 5 times" in why_not_compared([cost, timed(1.0, 1.1)])


@pytest.mark.parametrize(
    ("cost", "reason"),
    [
        (timed(1.0, 1.1), ""),
        (timed(1.0, 1.1, load=None), ""),
        (timed(1.0, 1.1, load=BUSY_LOAD), ""),
        (timed(1.0, 1.1, load=1.5), "the machine was busy while it was measured: its cores had at least 1.5"),
        (timed(1.0, 2.0), "the machine was not steady while it was measured: "),
        (Cost.exact(5.0), ""),
    ],
)
def test_times_of_a_busy_machine_are_not_compared(cost: Cost, reason: str) -> None:
    found = why_not_compared([timed(1.0, 1.1), cost])
    assert found.startswith(reason)
    assert bool(found) == bool(reason) == cost.is_busy


def test_the_cheapest_are_those_that_none_is_shown_to_beat() -> None:
    fast, near, slow = timed(1.0, 1.2), timed(1.1, 1.3), timed(2.0, 2.1)
    assert cheapest({"slow": slow, "near": near, "fast": fast, "unknown": None}) == ["near", "fast"]
    assert cheapest({"one": Cost.exact(1.0), "other": Cost.exact(1.0), "more": Cost.exact(2.0)}) == ["one", "other"]
    assert cheapest({"slow": slow, "busy": timed(1.0, 1.1, load=2.0)}) == ["slow", "busy"]
    assert cheapest({"one": None, "other": None}) == ["one", "other"]


def test_a_point_dominates_only_beyond_the_spread_of_costs() -> None:
    costs = [timed(1.0, 1.2), timed(1.1, 1.3), timed(2.0, 2.2)]
    assert pareto_front(costs, [2.0, 3.0, 2.5]) == [0, 1]  # the second may be cheaper than the first
    assert pareto_front(costs, [2.0, 1.0, 2.5]) == [0, 1]
    assert pareto_front([timed(1.0, 1.05), timed(1.1, 1.3)], [2.0, 3.0]) == [0]


def test_points_of_one_shape_are_ordered_by_their_figures() -> None:
    costs = [timed(1.0, 1.2, "lora"), timed(1.1, 1.3, "lora")]
    assert pareto_front(costs, [2.0, 1.0]) == [1]


def test_figures_not_told_apart_dominate_nothing() -> None:
    costs = [Cost.exact(1.0), Cost.exact(2.0), Cost.exact(3.0)]
    figures = [2.0, 2.1, 3.0]

    def apart(one: int, other: int) -> bool:
        return abs(figures[one] - figures[other]) > 0.5

    assert pareto_front(costs, figures) == [0]
    assert pareto_front(costs, figures, figures_apart=apart) == [0, 1]


def test_every_point_off_the_front_is_dominated_by_one_on_it() -> None:
    numbers = random.Random(0)
    costs = [timed(low, low + numbers.randint(1, 2)) for low in (numbers.randint(0, 9) for _ in range(60))]
    figures = [float(numbers.randint(0, 9)) for _ in range(60)]
    front = pareto_front(costs, figures)
    for index in range(60):
        beaten = [
            other
            for other in front
            if figures[other] <= figures[index] and (costs[other].high or 0.0) < (costs[index].low or 0.0)
        ]
        assert bool(beaten) != (index in front)
