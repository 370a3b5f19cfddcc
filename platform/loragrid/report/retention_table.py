"""The table of what a method reached along its path and kept at its end: evaluation loss and held-out text."""

from collections.abc import Callable, Sequence

from loragrid.comparison.metric_text import MISSING, format_difference, format_metric
from loragrid.comparison.settings import mean_figure
from loragrid.comparison.table import Comparison
from loragrid.formatting import format_value, is_missing
from loragrid.report.tables import Cell, PageTable

_LOSS = "eval/final_loss"

_PATH_COLUMNS: dict[str, tuple[str, Callable[[str, float], str]]] = {
    "eval/best_loss": ("lowest eval loss on the path", format_metric),
    "eval/final_loss": ("final eval loss", format_metric),
    "eval/overshoot": ("final above lowest", format_difference),
}
_HELD_OUT_COLUMNS: dict[str, tuple[str, Callable[[str, float], str]]] = {
    "forgetting/base_loss": ("held-out text, before", format_metric),
    "forgetting/best_step_loss": ("held-out text, at the lowest", format_metric),
    "forgetting/loss": ("held-out text, final", format_metric),
}


def retention_table(comparison: Comparison, choices: Sequence[tuple[str, Sequence[str]]]) -> PageTable:
    """One row per (label, trial ids) in `choices`: means over its trials of what the path reached and the end kept.

    The columns of the path are left out if no trial was evaluated between its first and its last step, those of the
    held-out text if the sweep has none. Without either, the table has no rows.
    """
    trial_ids = {trial_id for _, own in choices for trial_id in own}
    columns = {
        **(_PATH_COLUMNS if _has_path(comparison, trial_ids) else {}),
        **(_HELD_OUT_COLUMNS if _holds(comparison, trial_ids, "forgetting/loss") else {}),
    }
    if not _has_path(comparison, trial_ids):
        columns.pop("forgetting/best_step_loss", None)
    rows = tuple(
        (Cell(text=label), *(_cell(comparison, own, key, *columns[key]) for key in columns)) for label, own in choices
    )
    return PageTable(header=("method", *(heading for heading, _ in columns.values())), rows=rows if columns else ())


def _cell(
    comparison: Comparison, trial_ids: Sequence[str], key: str, _: str, write: Callable[[str, float], str]
) -> Cell:
    value = mean_figure(comparison, trial_ids, key)
    notes = _best_steps(comparison, trial_ids) if key == "eval/best_loss" else ()
    return Cell(text=MISSING if value is None else write(_LOSS, value), notes=notes, is_number=True)


def _best_steps(comparison: Comparison, trial_ids: Sequence[str]) -> tuple[str, ...]:
    """The steps at which the trials reached their lowest loss, as one note; empty if they were not recorded."""
    table = comparison.table
    if "eval/best_step" not in table:
        return ()
    steps = [
        int(step) for step in table.loc[table["trial_id"].isin(trial_ids), "eval/best_step"] if not is_missing(step)
    ]
    if not steps:
        return ()
    low, high = min(steps), max(steps)
    return (f"step {format_value(low)}" if low == high else f"steps {format_value(low)} to {format_value(high)}",)


def _has_path(comparison: Comparison, trial_ids: set[str]) -> bool:
    """Whether one of the trials was evaluated between its first and its last step."""
    curves = comparison.curves
    own = curves[(curves["key"] == "eval/loss") & curves["trial_id"].isin(trial_ids)]
    return bool((own.groupby("trial_id")["step"].count() > 2).any())


def _holds(comparison: Comparison, trial_ids: set[str], key: str) -> bool:
    table = comparison.table
    return key in table and not table.loc[table["trial_id"].isin(trial_ids), key].isna().all()
