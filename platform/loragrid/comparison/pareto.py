"""Finds the Pareto front: the settings for which no other has both a lower cost and a better figure."""

from collections.abc import Callable, Sequence

from loragrid.comparison.costs import Cost, are_same, is_lower


def pareto_front(
    costs: Sequence[Cost],
    figures: Sequence[float],
    *,
    higher_is_better: bool = False,
    figures_apart: Callable[[int, int], bool] | None = None,
) -> list[int]:
    """The indices of the points that no other point is shown to dominate, by rising cost.

    A point dominates another if it is no worse in both values and better in one. A cost is lower if the spreads are
    apart, and no worse if it is lower or the same. Costs whose spreads overlap may be either, so neither point
    dominates the other. The same holds for figures that are not apart. Equal points are all in the front.

    costs, figures: one per point; a lower figure is better, unless `higher_is_better`. figures_apart(i, j): whether the
    figures of points i and j are shown to be different; None: all that are not equal.
    """
    sign = -1.0 if higher_is_better else 1.0
    signed = [sign * figure for figure in figures]

    def is_better(one: int, other: int) -> bool:
        return signed[one] < signed[other] and (figures_apart is None or figures_apart(one, other))

    def dominates(one: int, other: int) -> bool:
        cheaper, better = is_lower(costs[one], costs[other]), is_better(one, other)
        if not cheaper and not are_same(costs[one], costs[other]):
            return False
        if not better and signed[one] != signed[other]:
            return False
        return cheaper or better

    front = [index for index in range(len(costs)) if not any(dominates(other, index) for other in range(len(costs)))]
    return sorted(front, key=lambda index: (costs[index].median, signed[index]))
