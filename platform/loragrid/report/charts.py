"""Draws a chart as SVG for an HTML page, without external fonts or scripts, with a title and a description in words."""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from loragrid.comparison.choice import Choice
from loragrid.report.loss_curves import COLOURS, LINE_STYLES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The width of a column on a desktop and of the screen on a phone, so that text has the same size on both.
CHART_INCHES = (4.6, 3.3)

# The sizes of a legend in letters: letters per inch, the line sample with its gaps, the margin.
LETTERS_PER_INCH, HANDLE_LETTERS, MARGIN_LETTERS = 13.8, 8, 6

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, which is small, searchable and readable by screen readers
    "text.parse_math": False,  # a method may be called `$x$`
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.titlesize": 10,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One drawing. description: its content in words, for screen readers. caption: how to read it."""

    title: str
    description: str
    caption: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class MethodStyle:
    """How one method looks in every chart. Line styles and markers tell methods apart without colours."""

    colour: str
    line_style: Any
    marker: str


def method_styles(methods: Iterable[str], choices: Iterable[Choice] = ()) -> dict[str, MethodStyle]:
    """Name -> style, for methods and for choices that are a part of a method ("lora rank 8").

    Colours are assigned to the sweep's methods in alphabetical order, as in the picture of the loss curves. The parts
    of a method share its colour.
    """
    styles = {method: _style(index, index) for index, method in enumerate(sorted(set(methods)))}
    places = {method: index for index, method in enumerate(styles)}
    for index, choice in enumerate(choices):
        styles.setdefault(choice.name, _style(places[choice.method], index))
    return styles


def _style(colour: int, form: int) -> MethodStyle:
    return MethodStyle(
        colour=COLOURS[colour % len(COLOURS)],
        line_style=LINE_STYLES[form % len(LINE_STYLES)],
        marker=MARKERS[form % len(MARKERS)],
    )


def draw(
    title: str,
    description: str,
    caption: str,
    paint: Callable[["Axes"], object],
    inches: tuple[float, float] = CHART_INCHES,
) -> Chart:
    """The chart that `paint` draws on empty axes."""
    # Not pyplot, because it keeps every figure in global state and may need a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.StringIO()
    style: Any = {**_STYLE, "svg.hashsalt": title}
    with rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.subplots())
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return Chart(
        title=title, description=description, caption=caption, svg=_inline(file.getvalue(), title, description)
    )


def _inline(drawing: str, title: str, description: str) -> Markup:
    """The drawing as part of an HTML page: with a title, sized by the page, with ids that no other drawing has."""
    name = f"c{hashlib.sha256((title + drawing).encode()).hexdigest()[:10]}"
    body = drawing[drawing.index(">", drawing.index("<svg")) + 1 : drawing.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would apply to the whole page
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\1{name}-", body)
    body = body.replace("xlink:href", "href").replace("<title>", "<desc>").replace("</title>", "</desc>")
    box = re.search(r'viewBox="([^"]+)"', drawing)
    assert box is not None
    head = f"<title id='{name}-title'>{escape(title)}</title><desc id='{name}-desc'>{escape(description)}</desc>"
    return Markup(
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" viewBox="{box.group(1)}" '
        f'style="max-width:{float(box.group(1).split()[2]) * 4 / 3:.0f}px">{head}{body}</svg>'
    )


def draw_line(
    panel: "Axes",
    xs: Sequence[float],
    ys: Sequence[float],
    style: MethodStyle,
    *,
    label: str,
    linewidth: float,
    markersize: float,
    markevery: int = 1,
) -> None:
    """Draw one method's line with its markers."""
    panel.plot(
        xs,
        ys,
        color=style.colour,
        linestyle=style.line_style,
        linewidth=linewidth,
        marker=style.marker,
        markersize=markersize,
        markeredgecolor="white",
        markeredgewidth=0.6,
        markevery=markevery,
        label=label,
    )


def draw_grid(panel: "Axes") -> None:
    """Draw a pale grid behind the lines."""
    panel.grid(color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)


def legend_above(panel: "Axes", most_columns: int = 3) -> None:
    """Draw the legend above the axes, where it hides no line, in as many columns as fit."""
    labels = panel.get_legend_handles_labels()[1]
    room = panel.get_figure(root=True).get_figwidth() * LETTERS_PER_INCH - MARGIN_LETTERS  # type: ignore[union-attr]

    def width(num_columns: int) -> int:
        columns = (list(column) for column in np.array_split(labels, num_columns))  # as matplotlib fills them
        return sum(max(map(len, column)) + HANDLE_LETTERS for column in columns if column)

    num_columns = next((number for number in range(most_columns, 1, -1) if width(number) <= room), 1)
    panel.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        frameon=False,
        ncols=num_columns,
        borderaxespad=0.2,
        handlelength=2.6,
        columnspacing=1.2,
    )


def labels_beside(panel: "Axes", points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names in a column to the right of the axes, without overlaps, and draw a line from each to its point.

    points: (x, y, text, colour).
    """
    gap = 0.075  # the height of a line of text, as a fraction of the height of the axes
    ordered = sorted(points, key=lambda point: point[1])
    places = [
        float(panel.transLimits.transform((0, panel.transScale.transform((1, point[1]))[1]))[1]) for point in ordered
    ]
    heights: list[float] = []
    for place in places:
        heights.append(max(place, heights[-1] + gap) if heights else max(0.0, place))
    # If the names reach above the axes, they move down together.
    for index in range(len(heights) - 1, -1, -1):
        heights[index] = min(heights[index], 1.0 - gap * (len(heights) - 1 - index))
    for (x, y, text, colour), height in zip(ordered, heights, strict=True):
        panel.annotate(
            text,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color="#222222",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4},
            annotation_clip=False,
        )


def ticks_between(low: float, high: float, base: float = 1000.0) -> list[float]:
    """Round values for about four ticks. base: the ratio of two units, 1024 for bytes."""
    from matplotlib.ticker import MaxNLocator

    unit = 1.0
    while high >= unit * 999.5:  # figures change to the next unit here
        unit *= base
    return [unit * float(place) for place in MaxNLocator(nbins=4).tick_values(low / unit, high / unit)]


def thin_out(points: Sequence[Any], most: int = 200) -> list[Any]:
    """At most `most` of the points, evenly spread, with the first and the last, so that the page stays small."""
    if len(points) <= most:
        return list(points)
    last = len(points) - 1
    return [points[round(index * last / (most - 1))] for index in range(most)]
