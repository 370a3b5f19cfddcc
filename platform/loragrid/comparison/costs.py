"""Compares costs that were measured: two are different only where their spreads are apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loragrid.formatting import is_missing
from loragrid.trials.tags import COST_SHAPE_TAG

if TYPE_CHECKING:
    from loragrid.comparison.table import Comparison

STEP_TIME = "time/step_seconds"

ENOUGH_REPEATS = 5
"""The fewest repeats that show a spread.

Five and five repeats of equal costs, taken in turns, fall into two ranges without overlap in 2 of 252 orders: 0.8 %.
"""
BUSY_LOAD = 1.1
"""A load above it (see `time/measure_load`) is that of a busy machine: its cores had a tenth too much to do."""
UNSTEADY_SPREAD = 0.5
"""A spread above this part of the median is that of a machine that did something else meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost with the range of its measurements, in the unit of its metric.

    low, high: None if the spread is unknown; equal to `median` if the cost is exact (parameters, bytes). shapes: the
    shapes that were measured, see `COST_SHAPE_TAG`; empty if they are unknown. load: of the CPUs while measuring; None
    if it is unknown.
    """

    median: float
    low: float | None
    high: float | None
    shapes: frozenset[str] = frozenset()
    load: float | None = None

    @classmethod
    def exact(cls, value: float) -> "Cost":
        """A cost that was counted."""
        return cls(median=value, low=value, high=value)

    @property
    def is_exact(self) -> bool:
        """Whether the cost has no spread."""
        return self.low == self.high == self.median

    @property
    def is_busy(self) -> bool:
        """Whether the machine had other work while this was measured."""
        return (self.load is not None and self.load > BUSY_LOAD) or self.is_unsteady

    @property
    def is_unsteady(self) -> bool:
        """Whether the spread is too wide for an undisturbed machine."""
        if self.low is None or self.high is None:
            return False
        return self.high - self.low > UNSTEADY_SPREAD * abs(self.median)


def cost_of(comparison: "Comparison", trial_ids: Sequence[str], metric: str) -> Cost | None:
    """The cost of a setting, from the trials of its seeds that have the metric; None if none has it.

    Trials of one shape share a measurement. If several workers measured a setting, the range covers all of them. Costs
    other than step times are exact; if they differ between seeds, the range covers them.
    """
    table = comparison.table
    if metric not in table:
        return None
    rows = [
        row
        for row in table.loc[table["trial_id"].isin(trial_ids)].to_dict("records")
        if not is_missing(row.get(metric))
    ]
    if not rows:
        return None
    values = sorted(float(row[metric]) for row in rows)
    middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
    shapes = {comparison.tags.get(row["trial_id"], {}).get(COST_SHAPE_TAG, "") for row in rows}
    if metric.startswith("parameters/"):
        shapes = set()  # counted for every trial, not measured
    known_shapes = frozenset(shapes - {""})
    if metric != STEP_TIME:
        return Cost(median=middle, low=values[0], high=values[-1], shapes=known_shapes)
    repeats = [_number(row.get("time/measure_repeats")) or 0.0 for row in rows]
    is_known = min(repeats) >= ENOUGH_REPEATS
    loads = [load for row in rows if (load := _number(row.get("time/measure_load"))) is not None]
    return Cost(
        median=middle,
        low=min(float(row["time/step_low_seconds"]) for row in rows) if is_known else None,
        high=max(float(row["time/step_high_seconds"]) for row in rows) if is_known else None,
        shapes=known_shapes,
        load=max(loads, default=None),
    )


def are_apart(one: Cost, other: Cost) -> bool:
    """Whether two costs are different: their ranges do not overlap, and they are not measurements of one shape.

    Costs whose spread is unknown are not known to be apart.
    """
    if are_same(one, other):
        return False
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.high < other.low or other.high < one.low


def are_same(one: Cost, other: Cost) -> bool:
    """Whether two costs are one and the same: exact and equal, or those of one shape."""
    if one.shapes and one.shapes == other.shapes:
        return True
    return one.is_exact and other.is_exact and one.median == other.median


def is_lower(one: Cost, other: Cost) -> bool:
    """Whether the first cost is lower than the second, beyond their spreads."""
    return are_apart(one, other) and one.median < other.median


def cheapest(costs: Mapping[str, Cost | None]) -> list[str]:
    """The names of the costs to which no other is shown to be lower; all names if the costs cannot be compared.

    None: not measured. Such a name is left out if another was measured.
    """
    known = {name: cost for name, cost in costs.items() if cost is not None}
    if not known or why_not_compared(known.values()):
        return list(costs)
    return [name for name, cost in known.items() if not any(is_lower(other, cost) for other in known.values())]


def why_not_compared(costs: Iterable[Cost]) -> str:
    """Why no conclusion may be drawn from these measured costs, as a part of a sentence; "" if one may."""
    found = [cost for cost in costs if not cost.is_exact]
    if any(cost.low is None for cost in found):
        return f"it was measured fewer than {ENOUGH_REPEATS} times, so that its spread is unknown"
    loads = [cost.load for cost in found if cost.load is not None and cost.load > BUSY_LOAD]
    if loads:
        return (
            f"the machine was busy while it was measured: its cores had at least {max(loads):.1f} times the work that "
            "they can do at once"
        )
    wide = sum(cost.is_unsteady for cost in found)
    if wide:
        return (
            f"the machine was not steady while it was measured: the longest of some steps exceeds the shortest by more "
            f"than {100 * UNSTEADY_SPREAD:.0f} % of their median ({wide} of {len(found)} settings)"
        )
    return ""


def _number(value: object) -> float | None:
    return None if is_missing(value) else float(value)  # type: ignore[arg-type]
