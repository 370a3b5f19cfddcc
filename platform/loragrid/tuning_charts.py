"""Charts of a figure over one axis: how each method takes to its learning rates, and whether its best lies inside."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from loragrid.charts import Chart, MethodStyle, draw, legend_above
from loragrid.counts import count_of
from loragrid.figures import format_value
from loragrid.heat_maps import SettingFigures, column_of, limits_of
from loragrid.metric_text import format_metric, metric_name
from loragrid.ranking import is_higher_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = ("lr", "lr_ratio", "rank")
INCHES = (7.2, 4.2)
MIN_VALUES = 3
"""Of fewer there is no course to be seen."""

Line = Sequence[tuple[float, float]]
"""(Value of the axis, figure) by rising value."""


def tuning_charts(
    settings: Mapping[str, SettingFigures], axes: Mapping[str, str], metric: str, styles: Mapping[str, MethodStyle]
) -> list[Chart]:
    """A chart per axis of `AXES` of which a method has tried three values; `axes` as `Comparison.axes`."""
    charts = []
    for name in AXES:
        column = column_of(axes, name)
        if column is None:
            continue
        lines = {method: line_of(figures, column, metric) for method, figures in sorted(settings.items())}
        lines = {method: line for method, line in lines.items() if len(line) >= MIN_VALUES}
        if lines:
            lacking = sum(figure is None for method in lines for _, figure in settings[method])
            charts.append(_chart(name, lines, lacking, metric, styles))
    return charts


def line_of(figures: SettingFigures, column: str, metric: str) -> list[tuple[float, float]]:
    """The best figure over all other axes at each value of one."""
    best = max if is_higher_better(metric) else min
    found: dict[float, float] = {}
    for values, figure in figures:
        place = values.get(column)
        if figure is not None and isinstance(place, int | float):
            found[float(place)] = best(figure, found.get(float(place), figure))
    return sorted(found.items())


def _chart(axis: str, lines: Mapping[str, Line], lacking: int, metric: str, styles: Mapping[str, MethodStyle]) -> Chart:
    frame = _frame(lines, metric)
    outside = sum(not frame[0] <= figure <= frame[1] for line in lines.values() for _, figure in line)
    caption = "The mean over seeds, the best over all other axes; the large mark is a method's best value."
    if outside:
        caption += f" {count_of(outside, 'worse point')} {'lies' if outside == 1 else 'lie'} outside the frame."
    if lacking:
        caption += f" Not drawn: {count_of(lacking, 'setting')} without all seeds."
    return draw(
        f"{metric_name(metric).capitalize()} over {axis}",
        "; ".join(
            f"{method}: {', '.join(f'{format_value(x)} {format_metric(metric, y)}' for x, y in line)}"
            for method, line in lines.items()
        ),
        caption,
        partial(_paint, axis=axis, lines=lines, metric=metric, styles=styles, frame=frame),
        INCHES,
    )


def _frame(lines: Mapping[str, Line], metric: str) -> tuple[float, float]:
    """Settings that failed to learn leave the frame, so that the others are seen apart."""
    low, high = limits_of([figure for line in lines.values() for _, figure in line], is_higher_better(metric))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _paint(
    panel: "Axes",
    axis: str,
    lines: Mapping[str, Line],
    metric: str,
    styles: Mapping[str, MethodStyle],
    frame: tuple[float, float],
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    best = max if is_higher_better(metric) else min
    for method, line in lines.items():
        style = styles[method]
        at_best = best(range(len(line)), key=lambda index, line=line: line[index][1])  # type: ignore[misc]  # bound early
        panel.plot(
            *zip(*line, strict=True),
            color=style.colour,
            linestyle=style.line_style,
            linewidth=1.4,
            marker=style.marker,
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=method,
        )
        panel.plot(
            *line[at_best],
            color=style.colour,
            linestyle="none",
            marker=style.marker,
            markersize=8.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=3,
        )
    panel.set_xscale("log")
    places = [place for line in lines.values() for place, _ in line]
    if max(places) >= 100 * min(places):
        panel.xaxis.set_major_locator(LogLocator(base=10, numticks=8))
    else:
        panel.set_xticks(sorted(set(places)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_ylim(*frame)
    panel.set_xlabel(axis)
    panel.set_ylabel(metric_name(metric))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_metric(metric, value)))
    panel.grid(color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)
    legend_above(panel)
