"""Ranks trials by the metric that settings are chosen by: the task's first figure, otherwise the loss."""

import math

import pandas as pd

from loragrid.comparison.table import Comparison
from loragrid.formatting import is_missing
from loragrid.tasks.discovery import figure_of, task_figures

VALIDATION_LOSS, TEST_LOSS = "eval/final_loss", "test/loss"


def validation_metrics() -> tuple[str, ...]:
    """Settings are chosen by the first of these metrics that any trial has."""
    return (*(f"eval/{figure.name}" for figure in task_figures()), VALIDATION_LOSS)


def test_metrics() -> tuple[str, ...]:
    """Chosen settings are compared by the first of these metrics that any trial has."""
    return (*(f"test/{figure.name}" for figure in task_figures()), TEST_LOSS)


def is_higher_better(metric: str) -> bool:
    """Whether more of the metric is better, as a task's figure declares it; of a loss, less is better."""
    figure = figure_of(metric)
    return figure is not None and figure.higher_is_better


def is_proportion(metric: str) -> bool:
    """Whether the metric is a share of rows, which is shown in per cent."""
    figure = figure_of(metric)
    return figure is not None and figure.is_proportion


def metric_words(metric: str) -> str:
    """`eval/final_loss` and a task's figures as a reader calls them: `evaluation loss`, `test accuracy`."""
    split, _, name = metric.partition("/")
    words = {"eval": "evaluation", "test": "test"}.get(split, split)
    figure = figure_of(metric)
    if figure is not None:
        return f"{words} {figure.words}"
    return f"{words} loss" if metric in (VALIDATION_LOSS, TEST_LOSS) else f"{split} {name}".replace("_", " ").strip()


def holds(table: pd.DataFrame, key: str) -> bool:
    """Whether any trial has the metric."""
    return key in table and bool(table[key].notna().any())


def ranking_metric(table: pd.DataFrame) -> str:
    """The metric of `validation_metrics` that decides between the trials of a comparison's table."""
    return next((key for key in validation_metrics() if holds(table, key)), VALIDATION_LOSS)


def sort_best_first(table: pd.DataFrame) -> pd.DataFrame:
    """Finished trials, the best by the ranking metric first (of equals that with the lower loss), then the others."""
    metric, finished = ranking_metric(table), table["status"] == "FINISHED"
    missing = pd.Series(math.nan, index=table.index)
    figure = table.get(metric, missing).where(finished)
    order = pd.DataFrame(
        {
            "other": ~finished,
            "figure": -figure if is_higher_better(metric) else figure,
            "loss": table.get(VALIDATION_LOSS, missing).where(finished),
        }
    )
    return table.loc[order.sort_values(["other", "figure", "loss"], kind="stable", na_position="last").index]


def best_trial(comparison: Comparison) -> str:
    """The finished trial that is best by the ranking metric; "" where none has a figure."""
    metric = ranking_metric(comparison.table)
    for row in sort_best_first(comparison.table).to_dict("records"):
        if row["status"] == "FINISHED" and not is_missing(row.get(metric)):
            return str(row["trial_id"])
    return ""
