"""Draws heat maps of a method's figure over two of its axes; they show whether the best values lie at an edge."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from loragrid.comparison.metric_text import format_metric
from loragrid.comparison.ranking import metric_words
from loragrid.formatting import format_value
from loragrid.report.charts import Chart, draw
from loragrid.tracking.store_uri import Scalar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS = (("lr", "rank"), ("lr", "lr_ratio"), ("lr", "batch_size"))

SettingFigures = Sequence[tuple[Mapping[str, Scalar], float | None]]
"""A method's settings: (values by axis, mean figure over seeds); None: the setting lacks seeds that others have."""


def heat_maps(
    settings: Mapping[str, SettingFigures], axes: Mapping[str, str], metric: str, higher_is_better: bool
) -> list[Chart]:
    """A map for every method and every pair of axes that both vary within the method. axes: see `Comparison`."""
    charts = []
    for method, figures in sorted(settings.items()):
        for pair in PAIRS:
            names = [column_of(axes, name) for name in pair]
            if None in names:
                continue
            column, row = (str(name) for name in names)
            grid = grid_of(figures, column, row, higher_is_better)
            if len(grid) > 1 and len(next(iter(grid.values()))) > 1:
                charts.append(_heat_map(method, pair, grid, metric, higher_is_better))
    return charts


def grid_of(
    figures: SettingFigures, column: str, row: str, higher_is_better: bool
) -> dict[float, dict[float, float | None]]:
    """Row value -> column value -> the best figure over all other axes; None if there is none."""
    known = [
        (float(level), float(place), figure)
        for values, figure in figures
        if isinstance(level := values.get(row), int | float) and isinstance(place := values.get(column), int | float)
    ]
    best = max if higher_is_better else min
    columns = sorted({place for _, place, _ in known})
    return {
        level: {
            place: best((f for r, c, f in known if (r, c) == (level, place) and f is not None), default=None)
            for place in columns
        }
        for level in sorted({level for level, _, _ in known})
    }


def column_of(axes: Mapping[str, str], name: str) -> str | None:
    """The column of the axis whose path ends in `name`."""
    return next((column for column, path in axes.items() if path.rpartition(".")[2] == name), None)


def _heat_map(
    method: str,
    pair: tuple[str, str],
    grid: Mapping[float, Mapping[float, float | None]],
    metric: str,
    higher_is_better: bool,
) -> Chart:
    what = f"{metric_words(metric)} over {pair[0]} × {pair[1]}"
    cells = "; ".join(
        f"{pair[1]} {format_value(level)}, {pair[0]} {format_value(place)}: {format_metric(metric, figure)}"
        for level, line in grid.items()
        for place, figure in line.items()
    )
    return draw(
        f"{method}: {what}",
        cells,
        "Mean over seeds, the best over all other axes. Framed: the best cell; –: no setting with all seeds.",
        partial(_paint, pair=pair, grid=grid, metric=metric, higher_is_better=higher_is_better),
        (4.6, 1.1 + 0.42 * len(grid)),
    )


def _paint(
    panel: "Axes",
    pair: tuple[str, str],
    grid: Mapping[float, Mapping[float, float | None]],
    metric: str,
    higher_is_better: bool,
) -> None:
    levels, places = list(grid), list(next(iter(grid.values())))
    panel.set_xlim(-0.5, len(places) - 0.5)
    panel.set_ylim(len(levels) - 0.5, -0.5)
    numbers = [[math.nan if (figure := grid[y][x]) is None else float(figure) for x in places] for y in levels]
    _paint_cells(panel, numbers, metric, higher_is_better)
    panel.set_xticks(range(len(places)), [format_value(place) for place in places])
    panel.set_yticks(range(len(levels)), [format_value(level) for level in levels])
    panel.set_xlabel(pair[0])
    panel.set_ylabel(pair[1])
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _paint_cells(panel: "Axes", numbers: Sequence[Sequence[float]], metric: str, higher_is_better: bool) -> None:
    """Draw a coloured cell with its figure for every number; NaN: no figure."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    present = [number for line in numbers for number in line if not math.isnan(number)]
    best = (max if higher_is_better else min)(present, default=math.nan)
    # Dark cells are good for losses and for accuracies; this stays visible in a black-and-white print.
    colours = "Blues" if higher_is_better else "Blues_r"
    limits = limits_of(present, higher_is_better)
    colour_map, scale = colormaps[colours], Normalize(*limits, clip=True)
    for y, line in enumerate(numbers):
        for x, number in enumerate(line):
            share = 0.0 if math.isnan(number) else (number - limits[0]) / ((limits[1] - limits[0]) or 1.0)
            dark = not math.isnan(number) and (share > 0.55 if higher_is_better else share < 0.45)
            text = "–" if math.isnan(number) else format_metric(metric, number)
            weight = "bold" if number == best else "normal"
            fill = "#f1f1f1" if math.isnan(number) else (*colour_map(scale(number))[:3], 0.85)
            panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=fill, edgecolor="white", lw=1))
            colour = "white" if dark else "#222222"
            panel.text(x, y, text, ha="center", va="center", fontsize=8.5, weight=weight, color=colour)
            if number == best:
                panel.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="#D55E00", lw=2))


def limits_of(values: Sequence[float], higher_is_better: bool) -> tuple[float, float]:
    """Limits of the colours: the best and the worst value.

    The worst value is cut at three times the distance between the best and the median value, because otherwise a
    setting that failed to learn would make all others look alike.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    ordered = sorted(values, reverse=higher_is_better)
    middle = ordered[len(ordered) // 2] if ordered else low
    if higher_is_better:
        return max(low, high - 3 * (high - middle)) if high > middle else low, high
    return low, min(high, low + 3 * (middle - low)) if middle > low else high
