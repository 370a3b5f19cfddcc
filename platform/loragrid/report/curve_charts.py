"""Draws the curves of each method's chosen setting: evaluation figures over steps, over tokens and over seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from loragrid.comparison.costs import STEP_TIME, cost_of, why_not_compared
from loragrid.comparison.metric_text import format_metric
from loragrid.comparison.ranking import is_proportion
from loragrid.comparison.sweep_record import SweepRecord
from loragrid.comparison.table import Comparison
from loragrid.report.charts import Chart, MethodStyle, draw, draw_grid, draw_line, legend_above, thin_out
from loragrid.tasks.discovery import task_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Trials that agree in these parameters train on the same rows in the same order, with equal tokens per step.
_ROW_PARAMETERS = ("model.name", "data.", "training.batch_size", "workers.")

CurvePoint = tuple[float, float, float, float]
"""One point of a line: (x, mean, lowest, highest)."""

# The fraction of a curve at its start that may leave the frame at the top.
START_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart: a setting over its seeds. label: also the key of its style."""

    label: str
    trial_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The curve that a row of charts draws.

    key: the curve's key in MLflow. metric: the metric that decides how figures are written. unit: the label of the
    axis. in_words: the unit in a sentence.
    """

    key: str
    title: str
    metric: str
    unit: str
    in_words: str


LOSS = Curve(
    key="eval/loss",
    title="Evaluation loss",
    metric="eval/final_loss",
    unit="loss (nats per token)",
    in_words="in nats per token",
)


def curves_of_tasks() -> list[Curve]:
    """The curves of the figures that task kinds compute."""
    return [
        Curve(
            key=f"eval/{figure.name}",
            title=f"Evaluation {figure.words}",
            metric=f"eval/{figure.name}",
            unit=figure.axis,
            in_words=f"of the {figure.axis}" if figure.is_proportion else f"({figure.axis})",
        )
        for figure in task_figures()
    ]


def curve_charts(
    record: SweepRecord, curves: pd.DataFrame, lines: Sequence[Line], styles: Mapping[str, MethodStyle], shown: str
) -> tuple[list[list[Chart]], list[str]]:
    """A row of charts for every curve, and a sentence for every chart that cannot be drawn.

    curves: see `Comparison`. shown: describes the lines, see `trials_caption`. A task's figure is drawn if it was
    recorded.
    """
    if curves[curves["key"] == LOSS.key].empty:
        missing = ["No evaluation loss was recorded: there is no curve to draw."]
        drawable = curves_of_tasks()
    else:
        missing, drawable = [], [LOSS, *curves_of_tasks()]
    costs = [cost_of(record.comparison, line.trial_ids, STEP_TIME) for line in lines]
    reason = why_not_compared(cost for cost in costs if cost is not None)
    absent = {**_ABSENT, "seconds": f"{STEP_TIMES}: {reason}" if reason else _ABSENT["seconds"]}
    seconds = {} if reason else seconds_per_step(record.comparison)
    scales = [
        ("steps", "step", dict.fromkeys(curves["trial_id"], 1.0), ""),
        ("tokens", "non-padding tokens", tokens_per_step(record), _TOKENS_CAPTION),
        ("seconds", "seconds of training", seconds, _SECONDS_CAPTION),
    ]
    rows: list[list[Chart]] = []
    for curve in drawable:
        own = curves[curves["key"] == curve.key]
        charts = []
        for name, label, scale, caption in scales:
            points = {line.label: _points(own, line, scale) for line in lines}
            drawn = {line: found for line, found in points.items() if found}
            if drawn:
                caption = caption or _steps_caption(shown, lines, curve, drawn)
                charts.append(_chart(curve, name, label, caption, drawn, styles))
            elif not own.empty:
                missing.append(f"{curve.title} over {name} is not drawn: {absent[name]}.")
        rows += [charts] if charts else []
    return rows, missing


def _chart(
    curve: Curve,
    name: str,
    label: str,
    caption: str,
    drawn: Mapping[str, Sequence[CurvePoint]],
    styles: Mapping[str, MethodStyle],
) -> Chart:
    ends = ", ".join(f"{line} {format_metric(curve.metric, points[-1][1])}" for line, points in drawn.items())
    return draw(
        f"{curve.title} over {name}",
        f"One line per method. Last values {curve.in_words}: {ends}.",
        caption,
        partial(_paint, curve=curve, drawn=drawn, styles=styles, label=label),
    )


def _steps_caption(shown: str, lines: Sequence[Line], curve: Curve, drawn: Mapping[str, Sequence[CurvePoint]]) -> str:
    has_band = any(len(line.trial_ids) > 1 for line in lines if line.label in drawn)
    band = "; the band spans the lowest and the highest of them" if has_band else ""
    cut = " The axis leaves out the steep start." if _frame(curve, list(drawn.values())) else ""
    return f"{shown}{band}.{cut}"


def tokens_per_step(record: SweepRecord) -> dict[str, float]:
    """Trial id -> non-padding tokens of one step: tokens per second times seconds per step of the solo measurement.

    The value is the median over all trials that train on the same rows, because these differ only by measurement noise.
    """
    table = record.comparison.table
    if not {"throughput/tokens_per_second", "time/step_seconds"} <= set(table.columns):
        return {}
    tokens = table["throughput/tokens_per_second"] * table["time/step_seconds"]
    rows_of = [
        tuple(
            sorted(item for item in record.trials[trial_id].parameters.items() if item[0].startswith(_ROW_PARAMETERS))
        )
        for trial_id in table["trial_id"]
    ]
    medians = tokens.groupby(pd.Series([str(rows) for rows in rows_of], index=table.index)).transform("median")
    return {trial_id: float(value) for trial_id, value in zip(table["trial_id"], medians, strict=True) if value > 0}


def seconds_per_step(comparison: Comparison) -> dict[str, float]:
    """Trial id -> seconds of one optimizer step, from the solo measurement."""
    table = comparison.table
    if STEP_TIME not in table:
        return {}
    pairs = zip(table["trial_id"], table[STEP_TIME], strict=True)
    return {trial_id: float(seconds) for trial_id, seconds in pairs if pd.notna(seconds)}


def _points(curves: pd.DataFrame, line: Line, scale: Mapping[str, float]) -> list[CurvePoint]:
    """The line's mean over its trials. x is the step times the mean of the trials' `scale`."""
    trial_ids = [trial_id for trial_id in line.trial_ids if trial_id in scale]
    own = curves[curves["trial_id"].isin(trial_ids)]
    if own.empty:
        return []
    factor = sum(scale[trial_id] for trial_id in trial_ids) / len(trial_ids)
    by_step = own.groupby("step")["value"].agg(["mean", "min", "max"]).sort_index()
    return thin_out(
        [
            (float(step) * factor, float(mean), float(low), float(high))
            for step, mean, low, high in zip(
                by_step.index, by_step["mean"], by_step["min"], by_step["max"], strict=True
            )
        ]
    )


def _paint(
    panel: "Axes",
    curve: Curve,
    drawn: Mapping[str, Sequence[CurvePoint]],
    styles: Mapping[str, MethodStyle],
    label: str,
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for line, points in drawn.items():
        style = styles[line]
        places, means, low, high = zip(*points, strict=True)
        if low != high:
            panel.fill_between(places, low, high, color=style.colour, alpha=0.14, linewidth=0)
        markevery = max(1, len(means) // 6)
        draw_line(panel, places, means, style, label=line, linewidth=1.6, markersize=4.5, markevery=markevery)
    panel.set_xlabel(label)
    panel.set_ylabel(curve.unit)
    panel.set_xlim(left=0)
    if frame := _frame(curve, list(drawn.values())):
        panel.set_ylim(*frame)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=5))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    if is_proportion(curve.metric):
        bottom, top = panel.get_ylim()
        panel.set_ylim(max(bottom, -0.01), min(top, 1.01))  # shares are between 0 and 1
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    draw_grid(panel)
    legend_above(panel)


def _frame(curve: Curve, lines: Sequence[Sequence[CurvePoint]]) -> tuple[float, float] | None:
    """Limits of the loss axis that leave out the steep start, which all methods share.

    None: everything is shown. This holds for a task's figures, because their first value is that of the bare base.
    """
    if curve.key != LOSS.key:
        return None
    start = START_SHARE * max(points[-1][0] for points in lines)
    behind = [point for points in lines for point in points if point[0] >= start]
    if len(behind) <= len(lines):
        return None
    low, high = min(point[2] for point in behind), max(point[3] for point in behind)
    if high == low or all(point[3] <= high for points in lines for point in points):
        return None
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _short(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


_TOKENS_CAPTION = (
    "Tokens are steps times the non-padding tokens of an average step (tokens per second times seconds per step of the "
    "solo measurement, median over trials with the same rows): an estimate, the same for all methods that train on the "
    "same rows."
)
_SECONDS_CAPTION = (
    "Seconds are steps times the step time of the trial, measured solo: training only, without set-up, compiling, "
    "evaluation and checkpoints, and without the time that sharing a pack saves."
)
STEP_TIMES = "the step time cannot be compared"
_ABSENT = {
    "steps": "no trial of a chosen setting has one",
    "tokens": "no throughput was measured",
    "seconds": "no step time was measured",
}
