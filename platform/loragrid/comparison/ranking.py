"""Ranks trials by the metric that also chooses settings: the task's first figure, otherwise the loss."""

import math

import pandas as pd

from loragrid.comparison.table import Comparison
from loragrid.formatting import is_missing
from loragrid.tasks.discovery import figure_of, task_figures

EVALUATION_LOSS, TEST_LOSS = "eval/final_loss", "test/loss"


def evaluation_metrics() -> tuple[str, ...]:
    """The metrics by which settings can be chosen, in order; the first that any trial has is used."""
    return (*(f"eval/{figure.name}" for figure in task_figures()), EVALUATION_LOSS)


def test_metrics() -> tuple[str, ...]:
    """The metrics by which chosen settings can be compared, in order; the first that any trial has is used."""
    return (*(f"test/{figure.name}" for figure in task_figures()), TEST_LOSS)


def is_higher_better(metric: str) -> bool:
    """Whether a higher value is better, as a task's figure declares it; False for a loss."""
    figure = figure_of(metric)
    return figure is not None and figure.higher_is_better


def is_proportion(metric: str) -> bool:
    """Whether the metric is a share of rows, which is shown in per cent."""
    figure = figure_of(metric)
    return figure is not None and figure.is_proportion


def metric_words(metric: str) -> str:
    """The metric's name in words, such as `evaluation loss` or `test accuracy`."""
    split, _, name = metric.partition("/")
    words = {"eval": "evaluation", "test": "test"}.get(split, split)
    figure = figure_of(metric)
    if figure is not None:
        return f"{words} {figure.words}"
    return f"{words} loss" if metric in (EVALUATION_LOSS, TEST_LOSS) else f"{split} {name}".replace("_", " ").strip()


def holds(table: pd.DataFrame, key: str) -> bool:
    """Whether any trial has the metric."""
    return key in table and bool(table[key].notna().any())


def ranking_metric(table: pd.DataFrame) -> str:
    """The metric of `evaluation_metrics` that ranks the trials of a comparison's table."""
    return next((key for key in evaluation_metrics() if holds(table, key)), EVALUATION_LOSS)


def sort_best_first(table: pd.DataFrame) -> pd.DataFrame:
    """Finished trials, best first by the ranking metric and then by the loss; then the other trials."""
    metric, finished = ranking_metric(table), table["status"] == "FINISHED"
    missing = pd.Series(math.nan, index=table.index)
    figure = table.get(metric, missing).where(finished)
    order = pd.DataFrame(
        {
            "other": ~finished,
            "figure": -figure if is_higher_better(metric) else figure,
            "loss": table.get(EVALUATION_LOSS, missing).where(finished),
        }
    )
    return table.loc[order.sort_values(["other", "figure", "loss"], kind="stable", na_position="last").index]


def best_trial(comparison: Comparison) -> str:
    """The finished trial that is best by the ranking metric; "" if no trial has the metric."""
    metric = ranking_metric(comparison.table)
    for row in sort_best_first(comparison.table).to_dict("records"):
        if row["status"] == "FINISHED" and not is_missing(row.get(metric)):
            return str(row["trial_id"])
    return ""
