"""The batch size as a tuned axis: choice, ends of its ladder, charts, and the rows that settings trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from loragrid.comparison.selection import choose
from loragrid.comparison.settings import Setting, settings_of
from loragrid.comparison.table import Comparison
from loragrid.comparison.tuning import budget_words
from loragrid.comparison.verdict import judge
from loragrid.report.charts import method_styles
from loragrid.report.heat_maps import heat_maps
from loragrid.report.html_page import Part, figures_by_method
from loragrid.report.tuning_charts import TuningCurve, tuning_charts
from tests.support.comparisons import made_up_comparison

AXES = {"lr": "training.lr", "batch_size": "training.batch_size", "steps": "training.steps", "seed": "seed"}
RATES = (1e-4, 1e-3, 1e-2)
BEST_RATE = {4: 1e-3, 8: 1e-2, 16: 1e-2}
"""Batch size -> the rate that suits it, as larger batches bear larger rates."""


def tuned(method: str, level: Mapping[int, float], **values: Any) -> list[dict[str, Any]]:
    """Three seeds of every rate and batch size; `level`: batch size -> loss at its best rate."""
    return [
        {
            "method": method,
            "lr": rate,
            "batch_size": size,
            **values,
            "seed": seed,
            "eval/final_loss": loss + 0.1 * (rate != BEST_RATE[size]) + 0.001 * seed,
            "test/loss": loss + 0.5,
        }
        for size, loss in level.items()
        for rate in RATES
        for seed in range(3)
    ]


def comparison_of(rows: Sequence[Mapping[str, Any]]) -> Comparison:
    axes = {name: path for name, path in AXES.items() if any(name in row for row in rows)}
    return made_up_comparison(rows, axes)


@pytest.mark.parametrize(
    ("level", "chosen", "edges"),
    [
        ({4: 2.0, 8: 1.9, 16: 2.1}, (1e-2, 8), {"lr": "highest"}),
        ({4: 1.8, 8: 1.9, 16: 2.1}, (1e-3, 4), {"batch_size": "lowest"}),
        ({4: 2.1, 8: 1.9, 16: 1.8}, (1e-2, 16), {"lr": "highest", "batch_size": "highest"}),
    ],
)
def test_settings_are_chosen_over_rates_and_batch_sizes(
    level: dict[int, float], chosen: tuple[float, int], edges: dict[str, str]
) -> None:
    (choice,) = choose(comparison_of(tuned("lora", level))).choices
    assert (choice.setting.values["lr"], choice.setting.values["batch_size"]) == chosen
    assert (choice.edge_sides, choice.num_settings) == (edges, 9)


def test_charts_draw_the_batch_size() -> None:
    comparison = comparison_of(tuned("lora", {4: 2.0, 8: 1.9, 16: 2.1}))
    part = Part(label="", comparison=comparison, settings=settings_of(comparison), verdict=judge(comparison))
    figures = figures_by_method(part, "eval/final_loss")
    (chart,) = heat_maps(figures, comparison.axes, "eval/final_loss", higher_is_better=False)
    assert chart.title == "lora: evaluation loss over lr × batch_size"
    assert "batch_size 8, lr 0.01: 1.9010" in chart.description
    curve = TuningCurve(name="lora", settings=figures["lora"], chosen={"lr": 1e-2, "batch_size": 8})
    charts = tuning_charts([curve], comparison.axes, "eval/final_loss", method_styles(["lora"]))
    assert [chart.title for chart in charts] == ["Evaluation loss over lr", "Evaluation loss over batch_size"]
    assert charts[1].description == "lora: 4 2.0010, 8 1.9010, 16 2.1010"


def chosen_of(comparison: Comparison) -> dict[str, Setting]:
    return {choice.name: choice.setting for choice in judge(comparison).choices}


def test_different_batch_sizes_are_said_to_be_different_budgets() -> None:
    rows = [*tuned("lora", {4: 2.0, 16: 1.9}), *tuned("vera", {4: 2.0}), *tuned("delta_lora", {8: 2.2})]
    comparison = comparison_of(rows)
    assert budget_words(comparison, chosen_of(comparison)) == (
        "Batch sizes differ: at equal steps, lora (batch 16) trained on 4 times the rows of vera (batch 4); "
        "between them: delta_lora (batch 8)."
    )


def test_equal_budgets_need_no_words() -> None:
    same = comparison_of([*tuned("lora", {4: 2.0, 16: 1.9}), *tuned("vera", {4: 2.0, 16: 1.9})])
    assert budget_words(same, chosen_of(same)) == ""
    fixed = comparison_of([{**row, "batch_size": 4} for row in tuned("lora", {4: 2.0})])
    assert budget_words(fixed, chosen_of(fixed)) == ""
    traded = comparison_of([*tuned("lora", {4: 2.0}, steps=40), *tuned("vera", {16: 2.0}, steps=10)])
    assert budget_words(traded, chosen_of(traded)) == ""
    partly = comparison_of([*tuned("lora", {4: 2.0}, steps=20), *tuned("vera", {16: 2.0}, steps=10)])
    assert budget_words(partly, chosen_of(partly)) == (
        "Batch sizes differ: with their own numbers of steps, vera (batch 16) trained on 2 times the rows of lora "
        "(batch 4)."
    )
