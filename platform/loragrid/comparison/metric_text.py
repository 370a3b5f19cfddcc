"""Writes a compared figure for a reader: losses in nats, accuracies in per cent, with as many digits as it takes."""

import math
from collections.abc import Callable

from loragrid.comparison.costs import STEP_TIME, Cost
from loragrid.comparison.method_comparison import LEVEL
from loragrid.comparison.ranking import is_proportion
from loragrid.formatting import format_seconds_range, format_seconds_roughly

MISSING = "–"
DECIMALS = 4
"""Decimals of a figure that is no proportion, unless two significant digits need more."""


def format_metric(metric: str, value: float | None) -> str:
    """A figure as text: `2.3456` for a loss, `41.2 %` for an accuracy."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f} %" if is_proportion(metric) else f"{value:.{_decimals(value)}f}"


def format_size(metric: str, value: float) -> str:
    """The size of a difference without its sign: `0.0123`, `1.2 points`; never a zero for a value that is none."""
    if is_proportion(metric):
        points = 100 * abs(value)
        return f"{points:.{1 if points >= 0.05 or points == 0 else 2}f} points"
    return f"{abs(value):.{_decimals(value)}f}"


def format_difference(metric: str, value: float | None) -> str:
    """A difference with its sign; differences of accuracies are in percentage points."""
    if value is None:
        return MISSING
    if is_proportion(metric):
        return f"{100 * value:+.1f} pp".replace("-", "−")
    return f"{value:+.{_decimals(value)}f}".replace("-", "−")


def format_range(metric: str, low: float | None, high: float | None) -> str:
    """An interval; `–` if it has no ends."""
    if low is None or high is None:
        return MISSING
    return f"{format_metric(metric, low)} to {format_metric(metric, high)}"


def format_p(value: float | None) -> str:
    """A p-value with three decimals; `< 0.001` for smaller ones, `< 0.05` for one below `LEVEL` that rounds to it."""
    if value is None:
        return MISSING
    if value < 0.001:
        return "< 0.001"
    return f"< {LEVEL:g}" if value < LEVEL <= float(f"{value:.3f}") else f"{value:.3f}"


def _decimals(value: float) -> int:
    """Four decimals, or those of two significant digits of a smaller value; at most 12."""
    if value == 0 or not math.isfinite(value) or abs(value) >= 10 ** (1 - DECIMALS):
        return DECIMALS
    return min(12, 1 - math.floor(math.log10(abs(value))))


def format_cost(metric: str, cost: Cost, write: Callable[[float], str]) -> str:
    """A cost as text, by `write`; a step time with the digits that its spread supports, or two if that is unknown."""
    if metric != STEP_TIME:
        return write(cost.median)
    if cost.low is None or cost.high is None:
        return format_seconds_roughly(cost.median)
    return format_seconds_range(cost.low, cost.high)
