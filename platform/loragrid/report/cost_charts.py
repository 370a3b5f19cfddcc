"""Draws costs: Pareto fronts over parameters, memory and time, and bars of memory and time by part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loragrid.comparison.metric_text import format_metric
from loragrid.comparison.pareto import pareto_front
from loragrid.comparison.ranking import is_higher_better, metric_words
from loragrid.formatting import count_of, format_bytes, format_count, format_seconds
from loragrid.report.charts import Chart, MethodStyle, draw, draw_grid, labels_beside, legend_above, ticks_between

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
    ("step time", (("time/step_seconds", "one optimizer step, measured solo"),), format_seconds),
)

MEMORY_PARTS = {
    "memory/base_bytes": "base",
    "memory/adapter_bytes": "adapters",
    "memory/gradient_bytes": "gradients",
    "memory/optimizer_bytes": "optimizer",
    "memory/saved_activation_bytes": "saved activations",
    "memory/loss_bytes": "loss",
}
TIME_PARTS = {
    "time/setup_seconds": "set-up",
    "time/measure_seconds": "measuring",
    "time/compile_seconds": "compiling",
    "time/train_seconds": "training",
    "time/data_seconds": "data",
    "time/eval_seconds": "evaluation",
    "time/generate_seconds": "answering",
    "time/checkpoint_seconds": "checkpoints",
    "time/check_seconds": "checking",
    "time/report_seconds": "reporting",
}
PART_COLOURS = (
    "#5B6C8F",
    "#0072B2",
    "#56B4E9",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#8C6D31",
    "#009E73",
    "#444444",
    "#BBBBBB",
)
PART_HATCHES = ("", "///", "", "\\\\\\", "", "///", "", "///", "", "\\\\\\")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting as a point of a Pareto chart.

    name: the key of its style, and its name in the chart if it is chosen. label: its name with its values.
    figure: mean over seeds. costs: metric key -> mean over seeds. is_chosen: whether it is its method's best setting.
    """

    name: str
    label: str
    figure: float
    costs: Mapping[str, float]
    is_chosen: bool


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One method's bar. parts: metric key -> value; parts that were not measured are left out."""

    label: str
    parts: Mapping[str, float]


def pareto_charts(
    points: Sequence[Point], metric: str, higher_is_better: bool, styles: Mapping[str, MethodStyle]
) -> tuple[list[Chart], list[str]]:
    """A chart for every cost that was measured, and a sentence for every cost that was not."""
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
        write = _in_one_unit(key, write, max(point.costs[key] for point in with_cost))
        front = pareto_front([(p.costs[key], p.figure) for p in with_cost], higher_is_better=higher_is_better)
        on_it = ", ".join(
            f"{with_cost[i].label} ({write(with_cost[i].costs[key])}, {format_metric(metric, with_cost[i].figure)})"
            for i in front
        )
        charts.append(
            draw(
                f"{metric_words(metric).capitalize()} against {name}",
                f"{count_of(len(with_cost), 'setting')}. On the front: {on_it}.",
                f"On the front: {on_it}." + _outside(with_cost),
                partial(
                    _paint_front,
                    points=with_cost,
                    key=key,
                    label=label,
                    write=write,
                    front=front,
                    metric=metric,
                    styles=styles,
                ),
            )
        )
    return charts, missing


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
    front: Sequence[int],
    metric: str,
    styles: Mapping[str, MethodStyle],
) -> None:
    from matplotlib.ticker import FuncFormatter

    panel.step(
        [points[i].costs[key] for i in front],
        [points[i].figure for i in front],
        where="post",
        color="#555555",
        linewidth=1.2,
        linestyle=(0, (4, 2)),
        zorder=1,
    )
    for point in sorted(points, key=lambda point: point.is_chosen):
        style = styles[point.name]
        panel.plot(
            point.costs[key],
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
    _scale_costs(panel, [point.costs[key] for point in points], key, write)
    low, high = figure_limits(points)
    panel.set_ylim(low, high)
    panel.set_xlabel(label)
    panel.set_ylabel(metric_words(metric))
    if is_higher_better(metric):
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_metric(metric, value)))
    draw_grid(panel)
    labels_beside(
        panel,
        [(p.costs[key], p.figure, p.name, styles[p.name].colour) for p in points if p.is_chosen],
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
        panel.set_xticks([tick for tick in ticks_between(left, right, _base_of(key)) if left <= tick <= right])
    tick = _in_one_unit(key, write, panel.get_xlim()[1])
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


def _in_one_unit(key: str, write: Callable[[float], str], largest: float) -> Callable[[float], str]:
    """A formatter that writes all byte counts of a chart in one unit, so that readers can compare them."""
    return partial(format_bytes, like=largest) if key.endswith("_bytes") else write


def _base_of(key: str) -> float:
    return 1024.0 if key.endswith("_bytes") else 1000.0


def bar_chart(
    title: str, bars: Sequence[Bar], parts: Mapping[str, str], write: Callable[[float], str], caption: str
) -> Chart | None:
    """Stacked bars, one per method; None if no part was measured. parts: metric key -> name."""
    known = [key for key in parts if any(bar.parts.get(key) is not None for bar in bars)]
    shown = [bar for bar in bars if any(key in bar.parts for key in known)]
    if not shown:
        return None
    described = "; ".join(
        f"{bar.label}: " + ", ".join(f"{parts[key]} {write(bar.parts[key])}" for key in known if key in bar.parts)
        for bar in shown
    )
    absent = [name for key, name in parts.items() if key not in known]
    if absent:
        caption += f" Not measured: {', '.join(absent)}."
    for bar in shown:
        lacking = [parts[key] for key in known if key not in bar.parts]
        if lacking:
            caption += f" {bar.label} lacks {', '.join(lacking)}."
    paint = partial(_paint_bars, bars=shown, parts=parts, known=known, write=write)
    return draw(title, described, caption, paint, (5.6, 1.5 + 0.36 * len(shown)))


def _paint_bars(
    panel: "Axes",
    bars: Sequence[Bar],
    parts: Mapping[str, str],
    known: Sequence[str],
    write: Callable[[float], str],
) -> None:
    """Draw the bars. known: the keys of `parts` that any bar has; a part has the same colour in every chart."""
    from matplotlib.ticker import FuncFormatter

    lefts = [0.0] * len(bars)
    for key in known:
        index = list(parts).index(key)
        widths = [bar.parts.get(key, 0.0) for bar in bars]
        panel.barh(
            range(len(bars)),
            widths,
            left=lefts,
            height=0.62,
            color=PART_COLOURS[index % len(PART_COLOURS)],
            hatch=PART_HATCHES[index % len(PART_HATCHES)],
            edgecolor="white",
            linewidth=0.5,
            label=parts[key],
        )
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    total_of = _in_one_unit(known[0], write, max(lefts))
    for place, total in enumerate(lefts):
        panel.annotate(total_of(total), (total, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    panel.set_yticks(range(len(bars)), [bar.label for bar in bars])
    panel.invert_yaxis()
    panel.set_xticks([tick for tick in ticks_between(0, max(lefts), _base_of(known[0])) if 0 <= tick <= max(lefts)])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: total_of(value) if value else "0"))
    panel.set_xlim(0, max(lefts) * 1.2 or 1.0)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    legend_above(panel)
