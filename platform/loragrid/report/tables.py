"""Builds a report's tables from a sweep's record. A missing value is a dash, never a zero."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loragrid.comparison.costs import STEP_TIME, cost_of
from loragrid.comparison.metric_text import MISSING, format_cost, format_metric
from loragrid.comparison.ranking import sort_best_first
from loragrid.comparison.settings import mean_figure
from loragrid.comparison.sweep_record import SweepRecord
from loragrid.comparison.table import PHASE_COLUMN, Comparison, is_stopped_early
from loragrid.formatting import (
    count_of,
    format_bytes,
    format_count,
    format_roughly,
    format_seconds,
    format_seconds_roughly,
    format_value,
    is_missing,
)
from loragrid.tasks.discovery import figure_of
from loragrid.trials.outcome import OUT_OF_MEMORY

PACK_TAG = "loragrid.pack"
SWEEP_ESTIMATE, SWEEP_TIME = "sweep/estimated_seconds", "sweep/wall_seconds"
PACK_ESTIMATE, PACK_PEAK = "memory/pack_estimated_bytes", "memory/pack_peak_bytes"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell. notes: smaller lines below the text; is_marked highlights them. is_number: aligned to the right."""

    text: str
    notes: tuple[str, ...] = ()
    is_number: bool = False
    is_marked: bool = False


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """A table of the page. header: one text per column. rows: one cell per column."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def unfinished_table(comparison: Comparison) -> PageTable:
    """Trials that did not finish, each with its reason; running out of memory is a result, too."""
    rows = [
        (
            Cell(text=row["trial_id"]),
            Cell(text=_setting_of(comparison, row)),
            Cell(text=end_of(row)),
            Cell(text=row["reason"] or MISSING),
        )
        for row in comparison.table.to_dict("records")
        if row["status"] != "FINISHED"
    ]
    return PageTable(header=("trial", "setting", "ended", "reason"), rows=tuple(rows))


def end_of(row: Mapping[Any, Any]) -> str:
    """How a trial ended, in words."""
    if is_stopped_early(row):
        return "stopped early"
    if row["status"] == "FAILED" and row["reason"].startswith(OUT_OF_MEMORY):
        return "out of memory"
    return str(row["status"]).lower()


def _setting_of(comparison: Comparison, row: Mapping[Any, Any]) -> str:
    values = [f"{name} {format_value(row[name])}" for name in comparison.axes if not is_missing(row[name])]
    return ", ".join([row["method"], *values])


def trial_table(comparison: Comparison, marked: Mapping[str, str]) -> PageTable:
    """All trials with their metrics, without the counts of rows, which few trials differ in.

    marked: trial id -> how its fingerprint differs, see `FingerprintReport`.
    """
    keys = [key for key in comparison.metric_keys if not key.startswith("data/")]
    heading = ("fingerprint",) if marked else ()
    phase = (PHASE_COLUMN,) if PHASE_COLUMN in comparison.table else ()
    rows = [
        (
            Cell(text=row["trial_id"]),
            *([Cell(text=marked.get(row["trial_id"], "like most"))] if marked else []),
            Cell(text=row["method"]),
            *(Cell(text=row[name]) for name in phase),
            Cell(text=end_of(row)),
            *(Cell(text=format_value(row[name]), is_number=True) for name in comparison.axes),
            *(
                Cell(text=MISSING if is_missing(row[key]) else write_figure(key, row[key]), is_number=True)
                for key in keys
            ),
        )
        for row in sort_best_first(comparison.table).to_dict("records")
    ]
    return PageTable(header=("trial", *heading, "method", *phase, "ended", *comparison.axes, *keys), rows=tuple(rows))


def write_figure(key: str, value: Any) -> str:
    """A figure, formatted for the unit in its key."""
    if key.endswith("_bytes"):
        return format_bytes(value)
    if key.startswith("time/step_") or key.endswith("seconds_to_threshold"):
        return format_seconds_roughly(value)
    if key.startswith("throughput/") and not key.endswith("_seconds"):
        return format_roughly(value)
    if key.endswith("_seconds"):
        return format_seconds(value)
    if key.startswith("parameters/"):
        return format_count(value)
    if key.endswith("loss") or figure_of(key) is not None:
        return format_metric(key, value)
    if value >= 1000:
        return f"{value:,.0f}"
    # Small values keep three significant digits, because 0.00002 must not be shown as 0.
    return format_value(
        (round(value, 4) if abs(value) >= 0.1 else float(f"{value:.3g}")) if isinstance(value, float) else value
    )


def parts_table(
    comparison: Comparison,
    choices: Sequence[tuple[str, Sequence[str]]],
    parts: Mapping[str, str],
    write: Callable[[float], str],
) -> PageTable:
    """The bars as numbers: one row per (label, trial ids) in `choices`, one column per part that any of them has."""
    values = {label: {key: mean_figure(comparison, trial_ids, key) for key in parts} for label, trial_ids in choices}
    keys = [key for key in parts if any(row[key] is not None for row in values.values())]
    rows = tuple(
        (
            Cell(text=label),
            *(
                _time_cell(comparison, trial_ids) if key == STEP_TIME else _written(values[label][key], write)
                for key in keys
            ),
        )
        for label, trial_ids in choices
        if keys
    )
    return PageTable(header=("method", *(parts[key] for key in keys)), rows=rows)


def _time_cell(comparison: Comparison, trial_ids: Sequence[str]) -> Cell:
    cost = cost_of(comparison, trial_ids, STEP_TIME)
    return Cell(text=MISSING if cost is None else format_cost(STEP_TIME, cost, format_seconds), is_number=True)


def _written(value: float | None, write: Callable[[float], str]) -> Cell:
    return Cell(text=MISSING if value is None else write(value), is_number=True)


def estimate_table(record: SweepRecord) -> PageTable:
    """Estimates beside measurements: the sweep's time and its packs' memory, if MLflow has both.

    Packs whose figures are equal as text share a row.
    """
    rows: list[tuple[Cell, ...]] = []
    if SWEEP_ESTIMATE in record.figures and SWEEP_TIME in record.figures:
        seconds = (record.figures[SWEEP_ESTIMATE], record.figures[SWEEP_TIME])
        rows.append(_estimate("the whole sweep", "time", _estimate_and_measurement(*seconds, format_seconds)))
    packs: dict[tuple[str, ...], list[str]] = {}
    for row in record.comparison.table.to_dict("records"):
        expected, came = row.get(PACK_ESTIMATE), row.get(PACK_PEAK)
        if expected is None or came is None or is_missing(expected) or is_missing(came):
            continue
        trial = record.trials.get(row["trial_id"])
        pack = trial.tags.get(PACK_TAG, row["trial_id"]) if trial else row["trial_id"]
        alike = packs.setdefault(_estimate_and_measurement(float(expected), float(came), format_bytes), [])
        if pack not in alike:
            alike.append(pack)
    for numbers, names in packs.items():
        first, *others = sorted(names)
        name = first if not others else f"{first} and {count_of(len(others), 'other pack')}"
        rows.append(_estimate(name, "GPU memory", numbers))
    return PageTable(header=("of", "what", "estimated", "measured", "measured / estimated"), rows=tuple(rows))


def _estimate_and_measurement(expected: float, came: float, write: Callable[[float], str]) -> tuple[str, ...]:
    return (write(expected), write(came), f"{came / expected:.2f}" if expected else MISSING)


def _estimate(name: str, what: str, numbers: tuple[str, ...]) -> tuple[Cell, ...]:
    return (Cell(text=name), Cell(text=what), *(Cell(text=text, is_number=True) for text in numbers))
