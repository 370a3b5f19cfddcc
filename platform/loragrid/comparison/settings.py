"""Groups the trials of a sweep into settings: the trials of one setting differ only in their seed."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loragrid.comparison.table import Comparison, plain_value
from loragrid.formatting import format_value, is_missing
from loragrid.tracking.store_uri import Scalar

TASK_SECTIONS = ("model.", "data.")
"""Axes in these sections change the task; figures of different tasks cannot be compared."""

Row = Mapping[Any, Any]
"""One trial: a row of `Comparison.table`."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method with one value for each of its hyperparameters, over all seeds.

    values: axis column in `Comparison.table` -> value, for the axes that vary within the method, without `seed`.
    trial_ids: seed -> trial id, for finished trials. num_trials: the number of all trials.
    """

    method: str
    values: Mapping[str, Scalar]
    trial_ids: Mapping[int, str]
    num_trials: int


def rows_by_setting(comparison: Comparison) -> list[list[dict[Any, Any]]]:
    """The rows of the table in groups that differ only in their seed; the groups keep the order of the table."""
    names = [name for name, path in comparison.axes.items() if path != "seed"]
    groups: dict[tuple[Any, ...], list[dict[Any, Any]]] = {}
    for row in comparison.table.to_dict("records"):
        groups.setdefault((row["method"], *(plain_value(row[name]) for name in names)), []).append(row)
    return list(groups.values())


def settings_of(comparison: Comparison) -> list[Setting]:
    """Every setting of the sweep, in the order of the table. If the sweep has one seed, its key is 0."""
    groups = rows_by_setting(comparison)
    names = {method: varying_within(comparison, groups, method) for method in {rows[0]["method"] for rows in groups}}
    return [setting_of(comparison, rows, names[rows[0]["method"]]) for rows in groups]


def tasks_of(comparison: Comparison) -> dict[str, Comparison]:
    """Label -> the part of the sweep on one model and one data set; one part with the label "" if neither varies."""
    names = [name for name, path in comparison.axes.items() if path.startswith(TASK_SECTIONS)]
    if not names:
        return {"": comparison}
    labels = [
        ", ".join(f"{name} {format_value(row[name])}" for name in names) for row in comparison.table.to_dict("records")
    ]
    axes = {name: path for name, path in comparison.axes.items() if name not in names}
    parts: dict[str, Comparison] = {}
    for label in dict.fromkeys(labels):
        table = comparison.table[[own == label for own in labels]]
        curves = comparison.curves[comparison.curves["trial_id"].isin(table["trial_id"])]
        parts[label] = replace(comparison, axes=axes, table=table, curves=curves)
    return parts


def show_setting(setting: Setting, without: Collection[str] = ()) -> str:
    """The values in which a setting differs from others of its method, such as `rank 8, lr 0.001`.

    without: axes to leave out.
    """
    shown = [f"{axis} {format_value(value)}" for axis, value in setting.values.items() if axis not in without]
    return ", ".join(shown) or "its only setting"


def setting_of(comparison: Comparison, rows: Sequence[Row], names: Sequence[str]) -> Setting:
    """The setting of rows that differ only in their seed. names: the axes of the setting."""
    return Setting(
        method=rows[0]["method"],
        values={name: plain_value(rows[0][name]) for name in names},
        trial_ids={seed_of(comparison, row): row["trial_id"] for row in rows if row["status"] == "FINISHED"},
        num_trials=len(rows),
    )


def varying_within(comparison: Comparison, groups: Sequence[Sequence[Row]], method: str) -> list[str]:
    """The axes, except the seed, in which the method's own settings differ."""
    own = [rows[0] for rows in groups if rows[0]["method"] == method]
    names = [name for name, path in comparison.axes.items() if path != "seed"]
    return [name for name in names if len({plain_value(row[name]) for row in own}) > 1]


def seed_of(comparison: Comparison, row: Row) -> int:
    """The trial's seed; 0 if the sweep has one seed, because then the table has no column for it."""
    name = next((name for name, path in comparison.axes.items() if path == "seed"), None)
    return 0 if name is None or is_missing(row[name]) else int(row[name])


def figure_in(row: Row, key: str) -> float | None:
    """The row's figure; None if it is missing or not finite."""
    value: Any = row.get(key)
    return None if is_missing(value) or not math.isfinite(value) else float(value)


def mean_figure(comparison: Comparison, trial_ids: Collection[str], key: str) -> float | None:
    """The mean of a metric over the trials that have it; None if none has it."""
    table = comparison.table
    if key not in table:
        return None
    present = [
        float(value) for value in table.loc[table["trial_id"].isin(list(trial_ids)), key] if not is_missing(value)
    ]
    return sum(present) / len(present) if present else None
