"""Draws the loss curves of a comparison into one picture."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from loragrid.comparison.settings import rows_by_setting
from loragrid.comparison.table import Comparison, sort_by_final_loss
from loragrid.formatting import format_value, is_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# The palette of Okabe and Ito, which colour-blind readers can tell apart; brown replaces its yellow, which is hard to
# see on white. The last four are for sweeps of many methods, in which line styles and markers help.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"),
    *("#6A3D9A", "#8A8F98", "#8B1A1A", "#2F4F2F"),
)
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.5)), (0, (6, 2, 1.2, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

LOSSES = ("eval/loss", "train/loss")

# The number of lines that readers can tell apart and that fit into the legend; lines that end higher are drawn pale.
MOST_NAMED = 32
PALE = "#c8c8c8"

# Training loss varies from batch to batch; from this number of points on, the picture shows a running mean.
MIN_POINTS_TO_SMOOTH = 20


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """One line of the picture: a setting over all its seeds. is_named: whether it is in the legend."""

    label: str
    trial_ids: tuple[str, ...]
    colour: str
    line_style: Any
    marker: str
    is_named: bool = True


def has_losses(comparison: Comparison) -> bool:
    """Whether the comparison has any loss curve."""
    return bool(comparison.curves["key"].isin(LOSSES).any())


def plot_loss_curves(comparison: Comparison, path: Path) -> Path:
    """Write a PNG with evaluation and training loss over steps: one line per setting, the mean over its seeds.

    The colour shows the method, the line style the rank and the marker the other axes; a band spans the seeds. The
    legend lists the final evaluation losses, lowest first. If there are more than 32 lines, the others are pale.

    Raises:
        ValueError: the sweep has no loss curve yet.
    """
    # Not pyplot, because it keeps every figure in global state and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = comparison.curves[comparison.curves["key"].isin(LOSSES)]
    if losses.empty:
        raise ValueError(f"sweep {comparison.sweep!r} of {comparison.experiment_name!r} has no loss curve yet")
    drawn = set(losses["trial_id"])
    settings = [line for line in group_by_setting(comparison) if drawn.intersection(line.trial_ids)]
    num_named = min(len(settings), MOST_NAMED)
    # Named lines come last, so that they are drawn above the others.
    settings = [*(replace(line, is_named=False) for line in settings[num_named:]), *settings[:num_named]]
    figure = Figure(figsize=(13.0, max(4.8, 1.8 + 0.22 * num_named)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    evaluation, training = figure.subplots(1, 2)
    legend: dict[str, Line2D] = {}
    legend |= _draw_panel(evaluation, losses[losses["key"] == "eval/loss"], settings, "evaluation loss")
    legend |= _draw_panel(training, losses[losses["key"] == "train/loss"], settings, "training loss", smooth=True)
    labels = [setting.label for setting in settings if setting.is_named and setting.label in legend]
    has_seeds = "seed" in comparison.axes
    notes = "\n(mean over seeds; band: lowest to highest)" if has_seeds else ""
    if len(settings) > num_named:
        notes += f"\nthe lowest {num_named}; {len(settings) - num_named} others in grey"
    figure.legend(
        [legend[label] for label in labels],
        labels,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        handlelength=4.0,
        title=f"final evaluation loss{notes}",
        title_fontsize=9,
        alignment="left",
    )
    # Lines are short, because the legend is beside the heading.
    heading = textwrap.fill(comparison.question or comparison.experiment_name, 80)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=13, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def group_by_setting(comparison: Comparison) -> list[LossCurve]:
    """The lines of the picture by mean final loss, lowest first; then settings without one, by their last loss."""
    table = sort_by_final_loss(comparison.table)
    names = [name for name, path in comparison.axes.items() if path != "seed"]
    methods = sorted(set(table["method"]))
    ranks = sorted(set(table["rank"].dropna())) if "rank" in names else []
    groups = rows_by_setting(replace(comparison, table=table))

    evaluations = comparison.curves[comparison.curves["key"] == "eval/loss"].sort_values("step")
    latest = {str(trial_id): float(points.iloc[-1]) for trial_id, points in evaluations.groupby("trial_id")["value"]}
    ranked: list[tuple[float, float, LossCurve]] = []
    markers: dict[tuple[str, Any], int] = {}
    for rows in groups:
        method, rank = rows[0]["method"], rows[0].get("rank")
        alike = (method, None if is_missing(rank) else rank)
        markers[alike] = markers.get(alike, -1) + 1
        loss = _mean_final_loss(rows)
        # Only axes that vary within the method: a learning rate that all LoRA trials share does not tell lines apart.
        shown = [name for name in names if name == "rank" or table[table["method"] == method][name].nunique() > 1]
        values = [f"{name} {format_value(rows[0][name])}" for name in shown if not is_missing(rows[0][name])]
        start = rows[0]["status"].lower() if math.isinf(loss) else f"{loss:.3f}"
        line = LossCurve(
            label=f"{start}  {method}  {', '.join(values)}".rstrip(),
            trial_ids=tuple(row["trial_id"] for row in rows),
            colour=COLOURS[methods.index(method) % len(COLOURS)],
            line_style=LINE_STYLES[0 if is_missing(rank) else ranks.index(rank) % len(LINE_STYLES)],
            marker=MARKERS[markers[alike] % len(MARKERS)],
        )
        ranked.append((loss, min(latest.get(row["trial_id"], math.inf) for row in rows), line))
    return [line for _, _, line in sorted(ranked, key=lambda entry: entry[:2])]


def _mean_final_loss(rows: Sequence[dict[Any, Any]]) -> float:
    losses: list[Any] = [row.get("eval/final_loss") for row in rows if row["status"] == "FINISHED"]
    present = [float(loss) for loss in losses if not is_missing(loss)]
    return sum(present) / len(present) if present else math.inf


def _draw_panel(
    panel: "Axes", points: pd.DataFrame, settings: Sequence[LossCurve], heading: str, smooth: bool = False
) -> dict[str, "Line2D"]:
    """Draw one loss of all settings; return label -> line."""
    from matplotlib.ticker import MaxNLocator

    longest = int(points.groupby("trial_id").size().max()) if not points.empty else 0
    window = longest // 10 if smooth and longest >= MIN_POINTS_TO_SMOOTH else 1
    lines: dict[str, Line2D] = {}
    means: list[pd.Series[float]] = []
    by_trial = points.pivot_table(index="step", columns="trial_id", values="value").sort_index()
    for setting in settings:
        by_seed = by_trial[by_trial.columns.intersection(list(setting.trial_ids))].dropna(how="all")
        if by_seed.empty:
            continue
        by_seed = by_seed.rolling(window, min_periods=1).mean()
        mean = by_seed.mean(axis="columns")
        means.append(mean)
        if not setting.is_named:
            panel.plot(mean.index, mean, color=PALE, linewidth=0.8, marker="." if len(mean) == 1 else None)
            continue
        if by_seed.shape[1] > 1:
            low, high = by_seed.min(axis="columns"), by_seed.max(axis="columns")
            panel.fill_between(mean.index, low, high, color=setting.colour, alpha=0.12, linewidth=0)
        (lines[setting.label],) = panel.plot(
            mean.index,
            mean,
            color=setting.colour,
            linestyle=setting.line_style,
            linewidth=1.8,
            marker=setting.marker,
            markersize=5,
            markeredgecolor="white",
            markevery=max(1, len(mean) // 6),
        )
    notes = [f"mean over {window} reports"] if window > 1 else []
    num_outside = _limit_height(panel, means)
    if num_outside:
        notes.append(f"{num_outside} {'curve leaves' if num_outside == 1 else 'curves leave'} the frame")
    panel.set_title(f"{heading} ({'; '.join(notes)})" if notes else heading, loc="left", fontsize=11)
    panel.set_xlabel("step")
    panel.set_ylabel("cross-entropy (nats per token)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    return lines


def _limit_height(panel: "Axes", means: Sequence["pd.Series[float]"]) -> int:
    """Limit the axis to curves that do not diverge; return how many curves leave the frame.

    A curve diverges if it ends above the highest start. A jump that all curves share (at a hard batch) stays visible.
    """
    start = max((float(mean.iloc[0]) for mean in means), default=0.0)
    calm = [mean for mean in means if mean.iloc[-1] <= start]
    if not calm:
        return 0
    low, high = min(float(mean.min()) for mean in calm), max(float(mean.max()) for mean in calm)
    top = max(high, start) + 0.25 * (max(high, start) - low)
    num_outside = sum(bool(mean.max() > top) for mean in means)
    if num_outside:
        panel.set_ylim(low - 0.05 * (top - low), top)
    return num_outside
