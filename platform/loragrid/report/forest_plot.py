"""Draws the forest plot of a verdict: every method's expected figure, and its difference to one method."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from loragrid.comparison.metric_text import format_metric, format_range
from loragrid.comparison.ranking import is_proportion, metric_words
from loragrid.comparison.verdict import Verdict
from loragrid.report.charts import CHART_INCHES, Chart, MethodStyle, draw, draw_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_INCHES, FRAME_INCHES = 0.32, 0.9


def forest_plots(verdict: Verdict, styles: "dict[str, MethodStyle]") -> list[Chart]:
    """Two charts, or none if nothing was compared: the methods' figures, and their differences to the answer's method.

    The rows have the order of the table of choices, best first.
    """
    if verdict.result is None or verdict.result.refusal:
        return []
    charts = [_estimates(verdict, styles)]
    if verdict.answer.recommended or verdict.answer.leader:
        charts += _differences(verdict, styles)
    return charts


def _estimates(verdict: Verdict, styles: "dict[str, MethodStyle]") -> Chart:
    words = metric_words(verdict.metric)
    found = [(choice.name, verdict.estimate(choice.name)) for choice in verdict.choices]
    rows = [
        (name, estimate.mean, estimate.low, estimate.high)
        for name, estimate in found
        if estimate is not None and estimate.low is not None and estimate.high is not None
    ]
    best = rows[0]
    described = "; ".join(
        f"{name} {format_metric(verdict.metric, mean)} ({format_range(verdict.metric, low, high)})"
        for name, mean, low, high in rows
    )

    def paint(panel: "Axes") -> None:
        panel.axvspan(_scaled(verdict, best[2]), _scaled(verdict, best[3]), color="#e9f1ea", linewidth=0)
        _paint_rows(panel, verdict, rows, styles)
        panel.set_xlabel(f"{words}{' (%)' if is_proportion(verdict.metric) else ''}")

    caption = (
        "Dot: mean. Line: 95 % interval of the method's expected figure over new seeds and new rows. Band: the "
        f"interval of {best[0]}. Methods are compared on the same seeds and rows, so methods whose lines overlap may "
        "still be told apart."
    )
    return draw(f"{words.capitalize()} of every method", described, caption, paint, _inches(len(rows)))


def _differences(verdict: Verdict, styles: "dict[str, MethodStyle]") -> list[Chart]:
    """The tested pairs of the answer's method; nothing if none was tested."""
    anchor = verdict.answer.recommended or verdict.answer.leader
    rows, shown = [], set[str]()
    for choice in verdict.choices:
        claim = verdict.claim(anchor, choice.name)
        if claim is None or claim.test.refusal or not claim.test.in_family:
            continue
        test, side = claim.test, 1 if claim.test.first == choice.name else -1
        low, high = sorted((side * test.low, side * test.high))
        rows.append((choice.name, side * test.difference, low, high))
        if claim.is_shown:
            shown.add(choice.name)
    described = "; ".join(f"{name} {mean:+.4g} ({low:+.4g} to {high:+.4g})" for name, mean, low, high in rows)
    better = "right" if verdict.higher_is_better else "left"

    def paint(panel: "Axes") -> None:
        panel.axvline(0, color="#555555", linewidth=0.9)
        _paint_rows(panel, verdict, rows, styles, hollow={name for name, *_ in rows} - shown)
        unit = " (percentage points)" if is_proportion(verdict.metric) else ""
        panel.set_xlabel(f"difference to {anchor}{unit}")

    caption = (
        "Mark: difference of the means, filled where a difference is shown. Line: 95 % interval, right for all pairs "
        f"at once. Further {better} is better. Holm's test can show a difference whose line just reaches 0."
    )
    return [draw(f"Against {anchor}", described, caption, paint, _inches(len(rows)))] if rows else []


def _paint_rows(
    panel: "Axes",
    verdict: Verdict,
    rows: Sequence[tuple[str, float, float, float]],
    styles: "dict[str, MethodStyle]",
    hollow: Collection[str] = (),
) -> None:
    """One line per row, the first at the top. hollow: rows whose mark is not filled."""
    places = range(len(rows) - 1, -1, -1)
    for place, (name, mean, low, high) in zip(places, rows, strict=True):
        style = styles[name]
        panel.plot([_scaled(verdict, low), _scaled(verdict, high)], [place, place], color=style.colour, linewidth=1.8)
        fill = "white" if name in hollow else style.colour
        panel.plot(
            [_scaled(verdict, mean)],
            [place],
            color=style.colour,
            marker=style.marker,
            markersize=6,
            markerfacecolor=fill,
        )
    panel.set_yticks(list(places), [name for name, *_ in rows])
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.locator_params(axis="x", nbins=5)
    draw_grid(panel)


def _scaled(verdict: Verdict, value: float) -> float:
    return 100 * value if is_proportion(verdict.metric) else value


def _inches(num_rows: int) -> tuple[float, float]:
    return (CHART_INCHES[0], FRAME_INCHES + ROW_INCHES * max(num_rows, 2))
