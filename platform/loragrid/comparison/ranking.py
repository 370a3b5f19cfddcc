"""Ranks trials by the metric that settings are chosen by: the accuracy where the task has one, else the loss."""

import math

import pandas as pd

from loragrid.comparison.table import Comparison
from loragrid.formatting import is_missing

VALIDATION_METRICS = ("eval/accuracy", "eval/final_loss")
"""The first of these that any trial has is what the verdict chooses by."""


def is_higher_better(metric: str) -> bool:
    """Of an accuracy more is better, of a loss less."""
    return metric.endswith("accuracy")


def holds(table: pd.DataFrame, key: str) -> bool:
    """Whether any trial has the metric."""
    return key in table and bool(table[key].notna().any())


def ranking_metric(table: pd.DataFrame) -> str:
    """The metric of `VALIDATION_METRICS` that decides between the trials of a comparison's table."""
    return next((key for key in VALIDATION_METRICS if holds(table, key)), VALIDATION_METRICS[-1])


def sort_best_first(table: pd.DataFrame) -> pd.DataFrame:
    """Finished trials, the best by the ranking metric first (of equals that with the lower loss), then the others."""
    metric, finished = ranking_metric(table), table["status"] == "FINISHED"
    missing = pd.Series(math.nan, index=table.index)
    figure = table.get(metric, missing).where(finished)
    order = pd.DataFrame(
        {
            "other": ~finished,
            "figure": -figure if is_higher_better(metric) else figure,
            "loss": table.get("eval/final_loss", missing).where(finished),
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
