"""Draws memory and time by part as stacked bars, one per method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loragrid.formatting import format_bytes
from loragrid.report.charts import Chart, draw, legend_above, ticks_between

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
class Bar:
    """One method's bar. parts: metric key -> value; parts that were not measured are left out."""

    label: str
    parts: Mapping[str, float]


def in_one_unit(key: str, write: Callable[[float], str], largest: float) -> Callable[[float], str]:
    """A formatter that writes all byte counts of a chart in one unit, so that readers can compare them."""
    return partial(format_bytes, like=largest) if key.endswith("_bytes") else write


def base_of(key: str) -> float:
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
    total_of = in_one_unit(known[0], write, max(lefts))
    for place, total in enumerate(lefts):
        panel.annotate(total_of(total), (total, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    panel.set_yticks(range(len(bars)), [bar.label for bar in bars])
    panel.invert_yaxis()
    panel.set_xticks([tick for tick in ticks_between(0, max(lefts), base_of(known[0])) if 0 <= tick <= max(lefts)])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: total_of(value) if value else "0"))
    panel.set_xlim(0, max(lefts) * 1.2 or 1.0)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    legend_above(panel)
