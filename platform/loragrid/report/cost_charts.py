"""Draws Pareto fronts: figures against parameters, memory and step time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loragrid.comparison.costs import STEP_TIME, Cost, why_not_compared
from loragrid.comparison.metric_text import format_cost, format_metric
from loragrid.comparison.pareto import pareto_front
from loragrid.comparison.ranking import is_higher_better, metric_words
from loragrid.formatting import count_of, format_bytes, format_count, format_seconds
from loragrid.report.bar_charts import base_of, in_one_unit
from loragrid.report.charts import Chart, MethodStyle, draw, draw_grid, labels_beside, ticks_between

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The costs with a front: (heading, (key, axis label) pairs of which the first measured key is used, formatter).
COSTS: tuple[tuple[str, tuple[tuple[str, str], ...], Callable[[float], str]], ...] = (
    ("trained parameters", (("parameters/trainable", "trained parameters"),), format_count),
    (
        "memory",
        (
            ("memory/peak_allocated_bytes", "peak GPU memory, measured solo"),
            ("memory/saved_activation_bytes", "saved activations, measured solo"),
        ),
        format_bytes,
    ),
    ("step time", ((STEP_TIME, "one optimizer step, measured solo"),), format_seconds),
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting as a point of a Pareto chart.

    name: the key of its style, and its name in the chart if it is chosen. label: its name with its values.
    figure: mean over seeds. costs: metric key -> cost. is_chosen: whether it is its method's best setting.
    """

    name: str
    label: str
    figure: float
    costs: Mapping[str, Cost]
    is_chosen: bool


def pareto_charts(
    points: Sequence[Point],
    metric: str,
    higher_is_better: bool,
    styles: Mapping[str, MethodStyle],
    figures_apart: Callable[[Point, Point], bool] | None = None,
) -> tuple[list[Chart], list[str]]:
    """A chart for every cost that was measured well enough, and a sentence for every other cost.

    figures_apart: whether the figures of two points are shown to be different; None: all that are not equal.
    """
    charts: list[Chart] = []
    missing: list[str] = []
    for name, keys, write in COSTS:
        key, label = next(
            ((key, label) for key, label in keys if any(key in point.costs for point in points)), (None, "")
        )
        if key is None:
            missing.append(f"No Pareto front over {name}, because no trial measured {name}.")
            continue
        with_cost = [point for point in points if key in point.costs]
        costs = [point.costs[key] for point in with_cost]
        if key == STEP_TIME and (reason := why_not_compared(costs)):
            missing.append(f"No Pareto front over {name}: {reason}.")
            continue
        write = in_one_unit(key, write, max(cost.median for cost in costs))
        front = pareto_front(
            costs,
            [point.figure for point in with_cost],
            higher_is_better=higher_is_better,
            figures_apart=_by_index(with_cost, figures_apart),
        )
        on_it = ", ".join(
            f"{with_cost[i].label} ({format_cost(key, costs[i], write)}, {format_metric(metric, with_cost[i].figure)})"
            for i in front
        )
        spreads = _SPREADS if key == STEP_TIME else ""
        charts.append(
            draw(
                f"{metric_words(metric).capitalize()} against {name}",
                f"{count_of(len(with_cost), 'setting')}. On the front: {on_it}.",
                f"On the front: {on_it}." + spreads + _outside(with_cost),
                partial(
                    _paint_front,
                    points=with_cost,
                    key=key,
                    label=label,
                    write=write,
                    line=_staircase(with_cost, front, key, higher_is_better),
                    metric=metric,
                    styles=styles,
                ),
            )
        )
    return charts, missing


_SPREADS = (
    " Bars: the shortest and the longest of the steps that were timed. Settings whose bars overlap are not told apart "
    "by their step time."
)


def _by_index(
    points: Sequence[Point], figures_apart: Callable[[Point, Point], bool] | None
) -> Callable[[int, int], bool] | None:
    return None if figures_apart is None else lambda one, other: figures_apart(points[one], points[other])


def _staircase(points: Sequence[Point], front: Sequence[int], key: str, higher_is_better: bool) -> list[int]:
    """The points of the front that its line connects: a line through overlapping costs would rise and fall."""
    medians = [Cost.exact(points[i].costs[key].median) for i in front]
    line = pareto_front(medians, [points[i].figure for i in front], higher_is_better=higher_is_better)
    return [front[i] for i in line]


def _outside(points: Sequence[Point]) -> str:
    low, high = figure_limits(points)
    number = sum(not low <= point.figure <= high for point in points)
    return f" {number} worse {'setting lies' if number == 1 else 'settings lie'} outside the frame." if number else ""


def _paint_front(
    panel: "Axes",
    points: Sequence[Point],
    key: str,
    label: str,
    write: Callable[[float], str],
    line: Sequence[int],
    metric: str,
    styles: Mapping[str, MethodStyle],
) -> None:
    from matplotlib.ticker import FuncFormatter

    panel.step(
        [points[i].costs[key].median for i in line],
        [points[i].figure for i in line],
        where="post",
        color="#555555",
        linewidth=1.2,
        linestyle=(0, (4, 2)),
        zorder=1,
    )
    for point in sorted(points, key=lambda point: point.is_chosen):
        style, cost = styles[point.name], point.costs[key]
        if cost.low is not None and cost.high is not None and not cost.is_exact:
            panel.hlines(point.figure, cost.low, cost.high, color=style.colour, alpha=0.5, linewidth=1.2, zorder=1)
        panel.plot(
            cost.median,
            point.figure,
            linestyle="none",
            marker=style.marker,
            color=style.colour,
            markersize=8 if point.is_chosen else 4.5,
            alpha=1.0 if point.is_chosen else 0.4,
            markeredgecolor="white" if point.is_chosen else style.colour,
            markeredgewidth=0.8,
            zorder=3 if point.is_chosen else 2,
        )
    panel.margins(0.08)
    _scale_costs(panel, [point.costs[key].median for point in points], key, write)
    low, high = figure_limits(points)
    panel.set_ylim(low, high)
    panel.set_xlabel(label)
    panel.set_ylabel(metric_words(metric))
    if is_higher_better(metric):
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_metric(metric, value)))
    draw_grid(panel)
    labels_beside(
        panel,
        [(p.costs[key].median, p.figure, p.name, styles[p.name].colour) for p in points if p.is_chosen],
    )


def _scale_costs(panel: "Axes", costs: Sequence[float], key: str, write: Callable[[float], str]) -> None:
    """Scale the axis of costs: logarithmic if the largest is more than eight times the smallest."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(costs) > 0 and max(costs) > 8 * min(costs):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(base=10, numticks=5))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        left, right = panel.get_xlim()
        panel.set_xticks([tick for tick in ticks_between(left, right, base_of(key)) if left <= tick <= right])
    tick = in_one_unit(key, write, panel.get_xlim()[1])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def figure_limits(points: Sequence[Point]) -> tuple[float, float]:
    """Limits of the axis of figures: the chosen settings and those near them.

    Settings that failed to learn lie outside, because the others could not be told apart otherwise.
    """
    all_figures = [point.figure for point in points]
    chosen = [point.figure for point in points if point.is_chosen] or all_figures
    low, high = min(chosen), max(chosen)
    room = 0.35 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = max(min(all_figures), low - room), min(max(all_figures), high + room)
    margin = 0.06 * (high - low) or room
    return low - margin, high + margin
