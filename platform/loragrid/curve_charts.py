"""The chosen settings' evaluation loss over steps, over tokens and over seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from loragrid.charts import Chart, MethodStyle, draw, legend_above, thin_out
from loragrid.comparison import Comparison
from loragrid.sweep_record import SweepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Trials that are equal in these train on the same rows in the same order: as many tokens per step.
_ROW_PARAMETERS = ("model.name", "data.", "training.batch_size", "workers.")


# This first part of a curve may leave the frame at the top.
START_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart: a method's setting, over its seeds; `label` is also the name of its style."""

    label: str
    trial_ids: tuple[str, ...]


def curve_charts(
    record: SweepRecord, curves: pd.DataFrame, lines: Sequence[Line], styles: Mapping[str, MethodStyle]
) -> tuple[list[Chart], list[str]]:
    """The charts of `curves` (as `Comparison.curves`) that can be drawn, and a sentence for each that cannot."""
    losses = curves[curves["key"] == "eval/loss"]
    if losses.empty:
        return [], ["No evaluation loss was recorded: there is no curve to draw."]
    scales = [
        ("steps", "step", dict.fromkeys(losses["trial_id"], 1.0), _STEPS_CAPTION, ""),
        ("tokens", "non-padding tokens", tokens_per_step(record), _TOKENS_CAPTION, _NO_TOKENS),
        ("seconds", "seconds of training", seconds_per_step(record.comparison), _SECONDS_CAPTION, _NO_SECONDS),
    ]
    charts: list[Chart] = []
    missing: list[str] = []
    for name, label, scale, caption, absent in scales:
        drawn = [line for line in lines if _points(losses, line, scale)]
        if not drawn:
            missing.append(absent or "No chosen setting has an evaluation loss.")
            continue
        ends = ", ".join(f"{line.label} {_points(losses, line, scale)[-1][1]:.4f}" for line in drawn)
        charts.append(
            draw(
                f"Evaluation loss over {name}",
                f"One line per method. Last values in nats per token: {ends}.",
                caption,
                partial(_paint, losses=losses, lines=drawn, scale=scale, styles=styles, label=label),
            )
        )
    return charts, missing


def tokens_per_step(record: SweepRecord) -> dict[str, float]:
    """Trial id -> non-padding tokens of one step: tokens per second times seconds per step, as measured alone.

    The median over all trials that train on the same rows, for they differ in the noise of the measurement only.
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
    """Trial id -> seconds of one optimizer step, measured on the trial alone."""
    table = comparison.table
    if "time/step_seconds" not in table:
        return {}
    pairs = zip(table["trial_id"], table["time/step_seconds"], strict=True)
    return {trial_id: float(seconds) for trial_id, seconds in pairs if pd.notna(seconds)}


def _points(losses: pd.DataFrame, line: Line, scale: Mapping[str, float]) -> list[tuple[float, float, float, float]]:
    """(place, mean, lowest, highest) of the seeds; the place is the step times the seeds' mean scale."""
    trial_ids = [trial_id for trial_id in line.trial_ids if trial_id in scale]
    own = losses[losses["trial_id"].isin(trial_ids)]
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
    losses: pd.DataFrame,
    lines: Sequence[Line],
    scale: Mapping[str, float],
    styles: Mapping[str, MethodStyle],
    label: str,
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for line in lines:
        style = styles[line.label]
        places, means, low, high = zip(*_points(losses, line, scale), strict=True)
        if len(line.trial_ids) > 1:
            panel.fill_between(places, low, high, color=style.colour, alpha=0.14, linewidth=0)
        panel.plot(
            places,
            means,
            color=style.colour,
            linestyle=style.line_style,
            linewidth=1.6,
            marker=style.marker,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            markevery=max(1, len(means) // 6),
            label=line.label,
        )
    panel.set_xlabel(label)
    panel.set_ylabel("loss (nats per token)")
    panel.set_xlim(left=0)
    _cut_start(panel, [_points(losses, line, scale) for line in lines])
    panel.xaxis.set_major_locator(MaxNLocator(nbins=5))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    panel.grid(color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)
    legend_above(panel, 3)


def _cut_start(panel: "Axes", lines: Sequence[Sequence[tuple[float, float, float, float]]]) -> None:
    """Lets the fast fall at the start, which all methods share, leave the frame: methods differ behind it."""
    start = START_SHARE * max(points[-1][0] for points in lines)
    behind = [point for points in lines for point in points if point[0] >= start]
    if len(behind) > len(lines):
        low, high = min(point[2] for point in behind), max(point[3] for point in behind)
        panel.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _short(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


_STEPS_CAPTION = (
    "The chosen setting of every method: mean over its seeds; the band spans the lowest and the highest seed. "
    "The axis leaves out the steep start."
)
_TOKENS_CAPTION = (
    "Tokens are steps times the non-padding tokens of an average step (tokens per second times seconds per step of the "
    "solo measurement, median over trials with the same rows): an estimate, the same for all methods that train on the "
    "same rows."
)
_SECONDS_CAPTION = (
    "Seconds are steps times the step time of the trial measured alone: training only, without set-up, compiling, "
    "evaluation and checkpoints, and without what sharing a pack saves."
)
_NO_TOKENS = "Loss over tokens is not drawn: no throughput was measured."
_NO_SECONDS = "Loss over seconds is not drawn: no step time was measured."
