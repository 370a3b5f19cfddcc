"""Builds a `Comparison` with known values, without an MLflow store."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from loragrid.comparison.table import NO_CURVES, Comparison

INTEGER_COLUMNS = ("rank", "steps", "seed")
Point = tuple[str, str, int, str, float]
"""(trial_id, method, step, key, value)."""


def made_up_comparison(
    rows: Sequence[Mapping[str, Any]], axes: Mapping[str, str], curves: Sequence[Point] = (), **fields: Any
) -> Comparison:
    """A comparison with one trial per row, FINISHED unless the row has a status. Axes without a column are dropped."""
    filled = [
        {"trial_id": f"{row.get('method')}-{i}", "status": "FINISHED", "reason": "", "run_id": f"r{i}", **row}
        for i, row in enumerate(rows)
    ]
    table = pd.DataFrame(filled)
    for name in INTEGER_COLUMNS:
        if name in table:
            table[name] = table[name].astype("Int64")
    return Comparison(
        **{
            "experiment_name": "made-up",
            "sweep": "only",
            "question": "",
            "tracking_uri": "sqlite:////nowhere.db",
            "experiment_id": "1",
            "sweep_run_id": "p",
            **fields,
        },
        axes={name: path for name, path in axes.items() if name in table},
        table=table,
        curves=pd.DataFrame(list(curves), columns=list(NO_CURVES)),
    )
