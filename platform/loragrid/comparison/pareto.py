"""Which settings no other one beats: lower cost at no higher loss."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]], *, higher_is_better: bool = False) -> list[int]:
    """The places in `points` (cost, figure) that no other point dominates, by rising cost.

    A point dominates another if it is no worse in both and better in one. Cost is always better when lower; the figure
    too, unless `higher_is_better`. Of equal points all stand in the front.
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
