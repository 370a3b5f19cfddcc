"""Reads what a sweep recorded about its rows: splits, groups, what was left out, and what the splits share."""

import json

from loragrid.comparison.settings import tasks_of
from loragrid.comparison.table import Comparison, plain_value
from loragrid.data.in_words import DataRecord
from loragrid.trials.tags import EXAMPLES_TAG, LEFT_OUT_TAG, MADE_FROM_TAG

__all__ = ["DataRecord", "data_record_of", "data_records_of"]


def data_record_of(comparison: Comparison) -> DataRecord | None:
    """The record of a sweep's rows; None if they are not recorded, or if the sweep has several data sets or models.

    Use `data_records_of`, or `tasks_of` first, for a sweep over several.
    """
    return data_records_of(comparison).get("")


def data_records_of(comparison: Comparison) -> dict[str, DataRecord]:
    """Label of a task (see `tasks_of`) -> the record of its rows; tasks without a record are left out."""
    found = {label: _record_of(part) for label, part in tasks_of(comparison).items()}
    return {label: record for label, record in found.items() if record is not None}


def _record_of(comparison: Comparison) -> DataRecord | None:
    if "data/train_rows" not in comparison.table:
        return None
    recorded = comparison.table[comparison.table["data/train_rows"].notna()]
    if recorded.empty:
        return None
    first = recorded.iloc[0]
    values = {str(key): plain_value(first[key]) for key in recorded.columns if str(key).startswith("data/")}
    tags = comparison.tags.get(str(first["trial_id"]), {})
    length = comparison.sweep_parameters.get("data.max_length") or plain_value(first.get("max_length"))
    trained = {
        name: (float(recorded[f"data/{name}"].min()), float(recorded[f"data/{name}"].max()))
        for name in ("trained_tokens", "trained_labels", "trained_epochs", "padding_share")
        if f"data/{name}" in recorded
    }
    return DataRecord.of(
        {key: value for key, value in values.items() if value is not None},
        json.loads(tags.get(LEFT_OUT_TAG, "{}")),
        int(length) if length else None,
        examples=json.loads(tags.get(EXAMPLES_TAG, "{}")),
        read_as=json.loads(tags.get(MADE_FROM_TAG, "{}")).get("shapes", {}),
        **trained,
    )
