"""Reads the scores of trials on single test rows from MLflow; paired tests over rows need them."""

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from loragrid.comparison.table import Comparison
from loragrid.tracking.mlflow_internals import quiet_store

SCORES_ARTIFACT = "scores/test.csv"
SCORE_COLUMNS = ("trial_id", "row", "group", "num_labels", "loss")


def load_scores(comparison: Comparison, trial_ids: Collection[str] | None = None) -> pd.DataFrame:
    """One line per trial and test row: trial_id, row, group, num_labels, loss; with an accuracy also `correct`.

    row: 16 hex digits that identify the row by its content. group: 16 hex digits that identify the row's group; rows of
    one group are dependent. In records that are older than groups, every row is a group of its own; only rows with
    equal content are one. loss: nats, summed over the row's `num_labels` labels. correct: 0 or 1. Only finished trials
    are read, and only those in `trial_ids` if given. Trials without scores are left out. Nothing is read if the sweep
    has no test metrics.
    """
    from mlflow import MlflowClient

    scores = pd.DataFrame(columns=list(SCORE_COLUMNS))
    if not any(column.startswith("test/") for column in comparison.table.columns):
        return scores
    finished = comparison.table[comparison.table["status"] == "FINISHED"]
    if trial_ids is not None:
        finished = finished[finished["trial_id"].isin(list(trial_ids))]
    parts: list[pd.DataFrame] = []
    with quiet_store(), no_progress_bars(), tempfile.TemporaryDirectory() as folder:
        client = MlflowClient(tracking_uri=comparison.tracking_uri)
        for trial_id, run_id in zip(finished["trial_id"], finished["run_id"], strict=True):
            if SCORES_ARTIFACT in {file.path for file in client.list_artifacts(run_id, "scores")}:
                target = Path(folder) / run_id
                target.mkdir()
                path = client.download_artifacts(run_id, SCORES_ARTIFACT, str(target))
                # Digests are text, because pandas would read digits such as 1234567890123456 or 12345678901e2345 as a
                # number. By default, pandas before 3 may read a loss with a different last digit.
                part = pd.read_csv(path, dtype={"row": str, "group": str}, float_precision="round_trip")
                if "group" not in part:
                    part.insert(1, "group", part["row"])
                part.insert(0, "trial_id", trial_id)
                parts.append(part)
    return pd.concat(parts, ignore_index=True) if parts else scores


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bar that MLflow draws for each small file."""
    key = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    is_set = key in os.environ
    os.environ.setdefault(key, "false")
    try:
        yield
    finally:
        if not is_set:
            del os.environ[key]
