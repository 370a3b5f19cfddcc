"""Separates the trials that choose settings from the trials that train the chosen settings again with fresh seeds."""

from collections.abc import Collection
from dataclasses import replace

from loragrid.comparison.settings import Setting, setting_of
from loragrid.comparison.table import PHASE_COLUMN, Comparison, plain_value
from loragrid.trials.tags import PHASE_TAG


def split_phases(comparison: Comparison) -> tuple[Comparison, Comparison | None]:
    """(The trials of the grid, the trials that confirm); the second is None if the sweep has none.

    Settings are chosen on the first part. What is reported of a chosen setting, and what is tested, are the figures of
    the second part: its seeds had no part in the choice. Both parts have the axes of the whole sweep, so that a setting
    has the same values in both, and `seed` is an axis of both. A trial without the tag `PHASE_TAG`, of a sweep recorded
    before there were phases, belongs to the first part.
    """
    trial_ids = [str(trial_id) for trial_id in comparison.table["trial_id"]]
    confirming = {trial_id for trial_id in trial_ids if is_confirming(comparison, trial_id)}
    if not confirming:
        return comparison, None
    return _only(comparison, set(trial_ids) - confirming), _only(comparison, confirming)


def is_confirming(comparison: Comparison, trial_id: str) -> bool:
    """Whether the trial trains a chosen setting with a fresh seed."""
    return comparison.tags.get(trial_id, {}).get(PHASE_TAG) == "confirm"


def confirmed_setting(setting: Setting, confirm: Comparison) -> Setting | None:
    """The same setting with the trials of its fresh seeds; None if it was not trained again.

    setting: of the part in which settings are chosen. confirm: the other part of the same sweep, see `split_phases`.
    """
    rows = [
        row
        for row in confirm.table.to_dict("records")
        if row["method"] == setting.method
        and all(plain_value(row[name]) == value for name, value in setting.values.items())
    ]
    return setting_of(confirm, rows, list(setting.values)) if rows else None


def _only(comparison: Comparison, trial_ids: Collection[str]) -> Comparison:
    """The comparison with these trials alone."""
    table, curves = comparison.table, comparison.curves
    return replace(
        comparison,
        table=table[table["trial_id"].isin(trial_ids)].drop(columns=PHASE_COLUMN, errors="ignore"),
        curves=curves[curves["trial_id"].isin(trial_ids)],
        tags={trial_id: tags for trial_id, tags in comparison.tags.items() if trial_id in trial_ids},
    )
