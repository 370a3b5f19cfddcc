"""The data of charts (fronts, grids, axis values), and the independence of drawings on one page."""

import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loragrid.comparison.costs import Cost
from loragrid.comparison.metric_text import format_difference, format_metric, format_p
from loragrid.comparison.pareto import pareto_front
from loragrid.comparison.sweep_record import SweepRecord, TrialRun
from loragrid.formatting import format_bytes
from loragrid.report.bar_charts import Bar, bar_chart
from loragrid.report.charts import CHART_INCHES, Chart, draw, legend_above, method_styles, thin_out, ticks_between
from loragrid.report.cost_charts import Point, figure_limits, pareto_charts
from loragrid.report.curve_charts import Line, curve_charts, seconds_per_step, tokens_per_step
from loragrid.report.heat_maps import grid_of, heat_maps
from loragrid.report.tables import write_figure
from loragrid.report.tuning_charts import TuningCurve, line_of, ticks_of, tuning_charts
from tests.support.comparisons import made_up_comparison


def test_a_front_holds_what_nothing_beats_in_both() -> None:
    costs = [Cost.exact(cost) for cost in (1.0, 2.0, 2.0, 3.0, 4.0, 5.0)]
    figures = [5.0, 3.0, 4.0, 3.0, 1.0, 2.0]
    assert pareto_front(costs, figures) == [0, 1, 4]
    assert pareto_front(costs, figures, higher_is_better=True) == [0]
    assert pareto_front([Cost.exact(1.0)] * 2, [1.0, 1.0]) == [0, 1]
    assert pareto_front([], []) == []


def test_every_point_off_the_front_is_dominated() -> None:
    numbers = random.Random(0)
    points = [(float(numbers.randint(0, 9)), float(numbers.randint(0, 9))) for _ in range(60)]
    front = pareto_front([Cost.exact(cost) for cost, _ in points], [loss for _, loss in points])
    for index, (cost, loss) in enumerate(points):
        beaten = [i for i in front if points[i] != (cost, loss) and points[i][0] <= cost and points[i][1] <= loss]
        assert bool(beaten) != (index in front)


def test_a_heat_map_cell_is_the_best_over_other_axes() -> None:
    figures = [
        ({"lr": 0.1, "rank": 8, "alpha": 1.0}, 3.0),
        ({"lr": 0.1, "rank": 8, "alpha": 2.0}, 2.0),
        ({"lr": 0.01, "rank": 8, "alpha": 1.0}, 4.0),
        ({"lr": 0.1, "rank": 16, "alpha": 1.0}, None),
    ]
    grid = grid_of(figures, "lr", "rank", higher_is_better=False)
    assert grid == {8.0: {0.01: 4.0, 0.1: 2.0}, 16.0: {0.01: None, 0.1: None}}
    assert grid_of(figures, "lr", "rank", higher_is_better=True)[8.0][0.1] == 3.0
    axes = {"rank": "method.rank", "lr": "training.lr"}
    (chart,) = heat_maps({"lora": figures}, axes, "eval/final_loss", higher_is_better=False)
    assert "rank 8, lr 0.1: 2.0000" in chart.description
    assert "rank 16, lr 0.1: –" in chart.description
    assert heat_maps({"lora": figures[:3]}, axes, "eval/final_loss", higher_is_better=False) == []


def record_of(rows: list[dict[str, object]], parameters: dict[str, dict[str, str]]) -> SweepRecord:
    comparison = made_up_comparison(rows, {})
    trials = {
        trial_id: TrialRun(run_id=trial_id, parameters=own, tags={}, started=None, ended=None)
        for trial_id, own in parameters.items()
    }
    return SweepRecord(
        comparison=comparison,
        trials=trials,
        experiment_yaml=None,
        is_rebuilt=False,
        status="FINISHED",
        started=None,
        ended=None,
    )


def test_trials_on_equal_rows_have_equal_tokens_per_step() -> None:
    speed, seconds = "throughput/tokens_per_second", "time/step_seconds"
    rows: list[dict[str, object]] = [
        {"trial_id": "a", speed: 1000.0, seconds: 0.47},
        {"trial_id": "b", speed: 2000.0, seconds: 0.26},
        {"trial_id": "c", speed: 100.0, seconds: 5.0},
        {"trial_id": "d", speed: 1000.0, seconds: 1.0},
        {"trial_id": "e", speed: None, seconds: None},
    ]
    small, large = {"data.name": "x", "training.batch_size": "4"}, {"data.name": "x", "training.batch_size": "8"}
    record = record_of(rows, {"a": small, "b": small, "c": small, "d": large, "e": {"data.name": "y"}})
    assert tokens_per_step(record) == {"a": 500.0, "b": 500.0, "c": 500.0, "d": 1000.0}
    assert seconds_per_step(record.comparison) == {"a": 0.47, "b": 0.26, "c": 5.0, "d": 1.0}


def test_drawings_on_one_page_share_no_ids_or_styles() -> None:
    charts = [draw(title, "words", "", lambda panel: panel.plot([0, 1], [0, 1])) for title in ("one", "two")]
    names = [set(chart.svg.split('id="')[1:]) for chart in charts]
    assert names[0]
    assert not {name.split('"')[0] for name in names[0]} & {name.split('"')[0] for name in names[1]}
    assert not any("<style" in chart.svg or "<metadata" in chart.svg or "http" in chart.svg for chart in charts)


def test_labels_with_markup_or_mathematics_are_drawn_literally() -> None:
    chart = draw("t", "<i>d</i>", "", lambda panel: panel.set_xlabel("<b>&$x^2$"))
    assert "&lt;b&gt;&amp;$x^2$" in chart.svg
    assert "&lt;i&gt;d&lt;/i&gt;" in chart.svg


def test_bars_leave_out_what_was_not_measured_and_name_it() -> None:
    parts = {"base": "base", "loss": "the loss"}
    chart = bar_chart("Memory", [Bar(label="lora", parts={"base": 2.0**20})], parts, format_bytes, "Caption.")
    assert chart is not None
    assert chart.caption == "Caption. Not measured: the loss."
    assert chart.description == "lora: base 1 MiB"
    assert bar_chart("Memory", [Bar(label="lora", parts={})], parts, format_bytes, "") is None


def test_a_bar_that_lacks_a_part_others_have_is_named() -> None:
    parts = {"base": "base", "loss": "the loss"}
    bars = [Bar(label="lora", parts={"base": 2.0**20, "loss": 2.0**20}), Bar(label="vera", parts={"base": 2.0**20})]
    chart = bar_chart("Memory", bars, parts, format_bytes, "Caption.")
    assert chart is not None
    assert chart.caption == "Caption. vera lacks the loss."


def test_bytes_in_one_chart_have_one_unit() -> None:
    sizes = {"lora": 983 * 2**20, "vera": 1006 * 2**20}
    bars = [Bar(label=name, parts={"memory/base_bytes": float(size)}) for name, size in sizes.items()]
    chart = bar_chart("Memory", bars, {"memory/base_bytes": "base"}, format_bytes, "")
    assert chart is not None
    points = [
        Point(
            name=name,
            label=name,
            figure=2.0 - size / 2**30,
            costs={"memory/peak_allocated_bytes": Cost.exact(float(size))},
            is_chosen=True,
        )
        for name, size in sizes.items()
    ]
    (front,), _ = pareto_charts(points, "eval/final_loss", False, method_styles(sizes))
    for drawing in (str(chart.svg).partition("</desc>")[2], str(front.svg).partition("</desc>")[2], front.caption):
        assert "GiB" in drawing
        assert "MiB" not in drawing
    assert "lora (0.96 GiB, 1.0400), vera (0.982 GiB, 1.0176)" in front.caption
    assert format_bytes(2**20, like=2**30) == "0.000977 GiB"


def timed_point(name: str, figure: float, low: float, high: float, load: float = 1.0) -> Point:
    cost = Cost(median=(low + high) / 2, low=low, high=high, shapes=frozenset({name}), load=load)
    return Point(name=name, label=name, figure=figure, costs={"time/step_seconds": cost}, is_chosen=True)


def charts_over_time(points: list[Point], **settings: Any) -> tuple[list[Chart], list[str]]:
    styles = method_styles([point.name for point in points])
    charts, missing = pareto_charts(points, "eval/final_loss", False, styles, **settings)
    return charts, [sentence for sentence in missing if "step time" in sentence]


def test_a_front_over_time_holds_what_may_be_fastest() -> None:
    points = [
        timed_point("lora", 2.0, 1.0, 1.2),
        timed_point("vera", 2.5, 0.9, 1.1),
        timed_point("dora", 3.0, 2.0, 2.1),
    ]
    (chart,), missing = charts_over_time(points)
    assert missing == []
    assert "On the front: vera (0.9 to 1.1 s, 2.5000), lora (1.0 to 1.2 s, 2.0000)." in chart.caption
    assert "Settings whose bars overlap are not told apart" in chart.caption


def test_figures_that_are_not_apart_keep_points_on_the_front() -> None:
    points = [timed_point("lora", 2.0, 1.0, 1.2), timed_point("dora", 2.1, 2.0, 2.1)]
    (chart,), _ = charts_over_time(points)
    assert "dora" not in chart.caption
    (chart,), _ = charts_over_time(points, figures_apart=lambda one, other: False)
    assert "dora (2.0 to 2.1 s, 2.1000)" in chart.caption


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (
            timed_point("vera", 2.5, 0.9, 1.1, load=1.6),
            "the machine was busy while it was measured: its cores had at least 1.6",
        ),
        (timed_point("vera", 2.5, 0.9, 5.0), "the machine was not steady while it was measured"),
        (
            replace(timed_point("vera", 2.5, 1, 1), costs={"time/step_seconds": Cost(median=1.0, low=None, high=None)}),
            "it was measured fewer than 5 times, so that its spread is unknown",
        ),
    ],
    ids=["busy", "unsteady", "an old store"],
)
def test_no_front_is_drawn_over_times_that_cannot_be_compared(point: Point, reason: str) -> None:
    charts, missing = charts_over_time([timed_point("lora", 2.0, 1.0, 1.2), point])
    assert charts == []
    (sentence,) = missing
    assert sentence.startswith(f"No Pareto front over step time: {reason}")


@pytest.mark.parametrize("load", [0.5, 1.6])
def test_curves_over_seconds_need_an_undisturbed_machine(load: float) -> None:
    seconds = {"time/step_seconds": 1.0, "time/step_low_seconds": 0.9, "time/step_high_seconds": 1.1}
    row = {"trial_id": "a", "method": "lora", **seconds, "time/measure_repeats": 5, "time/measure_load": load}
    record = record_of([row], {"a": {"data.name": "x"}})
    points = [("a", "lora", step, "eval/loss", 3.0 - step) for step in (0, 1, 2)]
    curves = made_up_comparison([row], {}, points).curves
    styles, lines = method_styles(["lora"]), [Line(label="lora", trial_ids=("a",))]
    rows, missing = curve_charts(record, curves, lines, styles, "Shown")
    titles = [chart.title for charts in rows for chart in charts]
    assert ("Evaluation loss over seconds" in titles) == (load < 1)
    told = [sentence for sentence in missing if "over seconds" in sentence]
    busy = "Evaluation loss over seconds is not drawn: the step time cannot be compared: the machine was busy while"
    assert [sentence.startswith(busy) for sentence in told] == ([] if load < 1 else [True])


@pytest.mark.parametrize("length", [4, 17, 25, 40])
def test_a_legend_stays_within_its_drawing(length: int) -> None:
    figure = Figure(figsize=CHART_INCHES, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    with rc_context({"legend.fontsize": 8.5}):
        panel = figure.subplots()
        for name in ("a", "m", "0", "x", "W"):
            panel.plot([0, 1], [0, 1], label=f"{name} of n".ljust(length, "e"))
        legend_above(panel)
        canvas.draw()  # type: ignore[no-untyped-call]
        legend = panel.get_legend()
    assert legend is not None
    box = legend.get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1


def test_failed_settings_do_not_flatten_the_others() -> None:
    def point(figure: float, is_chosen: bool) -> Point:
        return Point(name="m", label="m", figure=figure, costs={}, is_chosen=is_chosen)

    low, high = figure_limits([point(1.0, True), point(1.2, True), point(1.25, False), point(9.0, False)])
    assert low < 1.0
    assert 1.25 < high < 1.4


def test_styles_differ_without_colour_and_parts_share_their_methods_colour() -> None:
    styles = method_styles([f"m{index}" for index in range(8)])
    assert len({style.colour for style in styles.values()}) == 8
    assert len({style.marker for style in styles.values()}) == 8


def test_curves_are_thinned_to_their_ends_and_ticks_are_round() -> None:
    assert thin_out(list(range(10)), 4) == [0, 3, 6, 9]
    assert thin_out([1, 2], 4) == [1, 2]
    assert all(tick % (50 * 2**20) == 0 for tick in ticks_between(0, 900 * 2**20, 1024.0))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (format_metric("test/accuracy", 0.4125), "41.2 %"),
        (format_metric("test/loss", 2.25), "2.2500"),
        (format_metric("test/loss", None), "–"),
        (format_difference("test/accuracy", -0.031), "−3.1 pp"),
        (format_difference("test/loss", 0.5), "+0.5000"),
        (format_p(0.0004), "< 0.001"),
        (write_figure("throughput/fraction_of_device_limit", 0.0000234), "0.000023"),
        (write_figure("throughput/fraction_of_device_limit", 0.412345), "0.41"),
        (write_figure("time/step_seconds", 1.2345), "1.2 s"),
        (write_figure("time/setup_seconds", 1.2345), "1.23 s"),
        (write_figure("convergence/seconds_to_threshold", 1234.5), "21 min"),
        (format_p(0.04996), "< 0.05"),
        (format_p(0.05), "0.050"),
        (format_p(None), "–"),
    ],
)
def test_figures_are_written_for_readers(text: str, wanted: str) -> None:
    assert text == wanted


TUNED = (
    TuningCurve(
        name="lora",
        settings=[
            ({"lr": 1e-3, "rank": 8}, 0.70),
            ({"lr": 1e-3, "rank": 16}, 0.68),
            ({"lr": 1e-2, "rank": 8}, 0.66),
            ({"lr": 1e-2, "rank": 16}, None),
            ({"lr": 1e-1, "rank": 8}, 4.2),
            ({"lr": 0.0, "rank": 8}, 0.1),
            ({"lr": 1.0, "rank": 8}, math.inf),
            ({"lr": None, "rank": 8}, 0.1),
        ],
        chosen={"lr": 1e-2, "rank": 8},
    ),
    TuningCurve(
        name="vera", settings=[({"lr": 1e-3, "rank": 256}, 0.9), ({"lr": 1e-2, "rank": 256}, 0.8)], chosen={"lr": 1e-2}
    ),
)
AXIS_PATHS = {"lr": "training.lr", "rank": "method.rank"}


def test_a_tuning_curve_is_the_best_over_other_axes() -> None:
    lora, vera = TUNED
    assert line_of(lora.settings, "lr", "eval/final_loss") == [(1e-3, 0.68), (1e-2, 0.66), (1e-1, 4.2)]
    assert line_of(lora.settings, "lr", "eval/accuracy") == [(1e-3, 0.70), (1e-2, 0.66), (1e-1, 4.2)]
    styles = method_styles(["lora", "vera"])
    (chart,) = tuning_charts(TUNED, AXIS_PATHS, "eval/final_loss", styles)
    assert chart.title == "Evaluation loss over lr"
    assert chart.description == "lora: 0.001 0.6800, 0.01 0.6600, 0.1 4.2000", "VeRA has tried two"
    assert "1 worse point lies outside the frame. Not drawn: 1 setting without all seeds." in chart.caption
    assert tuning_charts([vera], AXIS_PATHS, "eval/final_loss", styles) == []
    assert tuning_charts(TUNED, {"rank": "method.rank"}, "eval/final_loss", styles) == []
    samples = TuningCurve(name="lora", settings=[({"lr": 1e-5 * n}, 1.0) for n in range(1, 42)], chosen={})
    assert tuning_charts([samples], AXIS_PATHS, "eval/final_loss", styles) == [], "samples are no ladder"


def test_a_large_mark_is_only_at_the_chosen_value() -> None:
    def marks(chosen: float | None) -> list[str]:
        settings = [({"lr": lr}, 0.5) for lr in (1e-4, 1e-3, 1e-2)]
        curve = TuningCurve(name="lora", settings=settings, chosen={"lr": chosen})
        (chart,) = tuning_charts([curve], AXIS_PATHS, "eval/accuracy", method_styles(["lora"]))
        return re.findall(r'<use href="#[^"]+" x="([0-9.]+)"[^>]*stroke: #ffffff; stroke-width: 0.8', chart.svg)

    (low,), (high,) = marks(1e-4), marks(1e-2)
    assert float(low) < float(high)
    assert marks(None) == []


def test_ticks_are_at_the_tried_values_if_they_fit() -> None:
    ranks = [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0]
    assert ticks_of([[(rank, 1.0) for rank in ranks[:3]], [(rank, 1.0) for rank in ranks[2:]]]) == ranks
    assert ticks_of([[(1e-3, 1.0), (1.2e-3, 1.0), (1e-2, 1.0)]]) is None, "too near each other"
    assert ticks_of([[(2.0**n, 1.0) for n in range(9)]]) is None, "too many"
