"""Writes a compared figure for a reader: losses in nats, accuracies in per cent, with interval and number of seeds."""

from collections.abc import Callable

from loragrid.comparison.costs import STEP_TIME, Cost
from loragrid.comparison.findings import LEVEL
from loragrid.comparison.ranking import is_proportion
from loragrid.comparison.statistics import Interval
from loragrid.formatting import format_seconds_range, format_seconds_roughly

MISSING = "–"


def format_metric(metric: str, value: float | None) -> str:
    """A figure as text: `2.3456` for a loss, `41.2 %` for an accuracy."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f} %" if is_proportion(metric) else f"{value:.4f}"


def format_difference(metric: str, value: float | None) -> str:
    """A difference with its sign; differences of accuracies are in percentage points."""
    if value is None:
        return MISSING
    text = f"{100 * value:+.1f} pp" if is_proportion(metric) else f"{value:+.4f}"
    return text.replace("-", "−")


def format_range(metric: str, interval: Interval | None) -> str:
    """The 95 % interval; `–` if there are too few values for one."""
    if interval is None or interval.low is None or interval.high is None:
        return MISSING
    return f"{format_metric(metric, interval.low)} to {format_metric(metric, interval.high)}"


def format_p(value: float | None) -> str:
    """A p-value with three decimals; `< 0.001` for smaller ones, `< 0.05` for one below `LEVEL` that rounds to it."""
    if value is None:
        return MISSING
    if value < 0.001:
        return "< 0.001"
    return f"< {LEVEL:g}" if value < LEVEL <= float(f"{value:.3f}") else f"{value:.3f}"


def format_cost(metric: str, cost: Cost, write: Callable[[float], str]) -> str:
    """A cost as text, by `write`; a step time with the digits that its spread supports, or two if that is unknown."""
    if metric != STEP_TIME:
        return write(cost.median)
    if cost.low is None or cost.high is None:
        return format_seconds_roughly(cost.median)
    return format_seconds_range(cost.low, cost.high)
