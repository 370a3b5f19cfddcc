"""Finds the Pareto front: the settings for which no other has both a lower cost and a better figure."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]], *, higher_is_better: bool = False) -> list[int]:
    """The indices of the `points` (cost, figure) that no other point dominates, by rising cost.

    A point dominates another if it is no worse in both values and better in one. A lower cost is better; so is a lower
    figure, unless `higher_is_better`. Equal points are all in the front.
    """
    sign = -1.0 if higher_is_better else 1.0
    signed = [(cost, sign * figure) for cost, figure in points]
    front = [
        index
        for index, (cost, loss) in enumerate(signed)
        if not any(
            other_cost <= cost and other_loss <= loss and (other_cost, other_loss) != (cost, loss)
            for other_cost, other_loss in signed
        )
    ]
    return sorted(front, key=lambda index: signed[index])
