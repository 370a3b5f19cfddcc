"""Draws each method's figure over one axis, such as the learning rate, and shows if the best value is at an end."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loragrid.comparison.metric_text import format_metric
from loragrid.comparison.ranking import is_higher_better, metric_words
from loragrid.formatting import count_of, format_value
from loragrid.report.charts import Chart, MethodStyle, draw, draw_grid, draw_line, legend_above
from loragrid.report.heat_maps import SettingFigures, column_of, limits_of
from loragrid.tracking.store_uri import Scalar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = ("lr", "lr_ratio", "batch_size", "rank")
INCHES = (7.2, 4.2)
MIN_VALUES, MAX_VALUES = 3, 40
"""Fewer values show no trend. More values come from a search that samples good regions more often."""
MAX_TICKS, MIN_TICK_RATIO = 8, 1.3

AxisLine = Sequence[tuple[float, float]]
"""(Value of the axis, figure), by rising value."""


@dataclass(frozen=True, kw_only=True)
class TuningCurve:
    """The tuning of one contestant. settings: with their figures. chosen: the values of the chosen setting."""

    name: str
    settings: SettingFigures
    chosen: Mapping[str, Scalar]


def tuning_charts(
    curves: Sequence[TuningCurve], axes: Mapping[str, str], metric: str, styles: Mapping[str, MethodStyle]
) -> list[Chart]:
    """A chart for every axis in `AXES` of which some contestant tried at least three values. axes: see `Comparison`."""
    charts = []
    for name in AXES:
        column = column_of(axes, name)
        if column is None:
            continue
        lines = {curve.name: line_of(curve.settings, column, metric) for curve in curves}
        lines = {curve: line for curve, line in lines.items() if MIN_VALUES <= len(line) <= MAX_VALUES}
        drawn = [curve for curve in curves if curve.name in lines]
        if drawn:
            lacking = sum(figure is None for curve in drawn for _, figure in curve.settings)
            chosen = {curve.name: curve.chosen.get(column) for curve in drawn}
            charts.append(_chart(name, lines, chosen, lacking, metric, styles))
    return charts


def line_of(figures: SettingFigures, column: str, metric: str) -> list[tuple[float, float]]:
    """The best figure over all other axes at each positive value of `column`; other values are left out."""
    best = max if is_higher_better(metric) else min
    found: dict[float, float] = {}
    for values, figure in figures:
        place = values.get(column)
        if figure is not None and math.isfinite(figure) and isinstance(place, int | float) and place > 0:
            found[float(place)] = best(figure, found.get(float(place), figure))
    return sorted(found.items())


def ticks_of(lines: Sequence[AxisLine]) -> list[float] | None:
    """The values that were tried, if their labels fit beside each other; None: use round values."""
    places = sorted({place for line in lines for place, _ in line})
    apart = all(high >= MIN_TICK_RATIO * low for low, high in itertools.pairwise(places))
    return places if len(places) <= MAX_TICKS and apart else None


def _chart(
    axis: str,
    lines: Mapping[str, AxisLine],
    chosen: Mapping[str, Scalar],
    lacking: int,
    metric: str,
    styles: Mapping[str, MethodStyle],
) -> Chart:
    frame = _frame(lines, metric)
    outside = sum(not frame[0] <= figure <= frame[1] for line in lines.values() for _, figure in line)
    caption = "The mean over seeds, the best over all other axes; the large mark is the chosen setting."
    if outside:
        caption += f" {count_of(outside, 'worse point')} {'lies' if outside == 1 else 'lie'} outside the frame."
    if lacking:
        caption += f" Not drawn: {count_of(lacking, 'setting')} without all seeds."
    return draw(
        f"{metric_words(metric).capitalize()} over {axis}",
        "; ".join(
            f"{name}: {', '.join(f'{format_value(x)} {format_metric(metric, y)}' for x, y in line)}"
            for name, line in lines.items()
        ),
        caption,
        partial(_paint, axis=axis, lines=lines, chosen=chosen, metric=metric, styles=styles, frame=frame),
        INCHES,
    )


def _frame(lines: Mapping[str, AxisLine], metric: str) -> tuple[float, float]:
    """Limits of the axis of figures. Settings that failed to learn lie outside, see `limits_of`."""
    low, high = limits_of([figure for line in lines.values() for _, figure in line], is_higher_better(metric))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _paint(
    panel: "Axes",
    axis: str,
    lines: Mapping[str, AxisLine],
    chosen: Mapping[str, Scalar],
    metric: str,
    styles: Mapping[str, MethodStyle],
    frame: tuple[float, float],
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, line in lines.items():
        style = styles[name]
        xs, ys = zip(*line, strict=True)
        draw_line(panel, xs, ys, style, label=name, linewidth=1.4, markersize=4)
        for place, figure in line:
            if place == chosen[name]:
                panel.plot(
                    place,
                    figure,
                    color=style.colour,
                    linestyle="none",
                    marker=style.marker,
                    markersize=8.5,
                    markeredgecolor="white",
                    markeredgewidth=0.8,
                    zorder=3,
                )
    panel.set_xscale("log")
    if ticks := ticks_of(list(lines.values())):
        panel.set_xticks(ticks)
    else:
        span = [place for line in lines.values() for place, _ in line]
        in_between = (1.0,) if max(span) >= 100 * min(span) else (1.0, 2.0, 5.0)
        panel.xaxis.set_major_locator(LogLocator(base=10, subs=in_between, numticks=8))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_ylim(*frame)
    panel.set_xlabel(axis)
    panel.set_ylabel(metric_words(metric))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_metric(metric, value)))
    draw_grid(panel)
    legend_above(panel)
