"""Reads a sweep from MLflow, and from no other source, as a table of trials and a table of their curves."""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from loragrid.comparison.axes import varying_axes
from loragrid.formatting import is_missing
from loragrid.tracking.mlflow_internals import quiet_store
from loragrid.tracking.store_uri import Scalar, parse_parameter, sqlite_path
from loragrid.trials.metrics import CURVE_METRICS, curve_keys, summary_metrics
from loragrid.trials.outcome import STOPPED_EARLY
from loragrid.trials.tags import (
    FOUND_TAG,
    KIND_TAG,
    LABEL_TAG,
    METHOD_TAG,
    PARENT_TAG,
    PHASE_TAG,
    QUESTION_TAG,
    REASON_TAG,
    TRIAL_TAG,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Run

IDENTITY_COLUMNS = ("trial_id", "status", "method")
CLOSING_COLUMNS = ("reason", "run_id")
PHASE_COLUMN = "phase"
NO_CURVES = pd.DataFrame(columns=["trial_id", "method", "step", "key", "value"])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One sweep, read from MLflow.

    table: one row per trial, in the order of their starts. Its columns are trial_id, status, method (the label, if the
    experiment has one for the method), phase (tune or confirm, if the sweep has trials that confirm), every axis that
    varies, every metric of the sweep by its MLflow key, reason and run_id. Values that were not measured are missing.
    curves: one row per point, with the columns trial_id, method, step, key and value.
    axes: axis column of the table -> dotted path in the YAML file.
    methods: entry of the table's method column -> the method's name.
    """

    experiment_name: str
    sweep: str
    question: str
    tracking_uri: str
    experiment_id: str
    sweep_run_id: str
    axes: Mapping[str, str]
    table: pd.DataFrame
    curves: pd.DataFrame
    methods: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Trial id -> all tags of its run, from which `fingerprint_of` reads what it ran on."""
    sweep_parameters: Mapping[str, str] = field(default_factory=dict)
    """The parameters of the sweep's own run: dotted path -> text."""
    sweep_metrics: Mapping[str, float] = field(default_factory=dict)
    """The metrics of the sweep's own run by MLflow key: how its trials ended, its cost and its estimated time."""

    @cached_property
    def metric_keys(self) -> list[str]:
        outside = {*IDENTITY_COLUMNS, PHASE_COLUMN, *CLOSING_COLUMNS, *self.axes}
        return [column for column in self.table.columns if column not in outside]

    def to_csv(self) -> str:
        """The table as CSV text; a value that was not measured is an empty cell."""
        text = io.StringIO()
        self.table.to_csv(text, index=False, lineterminator="\n")
        return text.getvalue()

    def to_json(self, curves: bool = False) -> str:
        """The table as JSON text; a value that was not measured is `null`. curves: include every trial's curves."""
        trials = [{str(key): _json_value(value) for key, value in row.items()} for row in self.table.to_dict("records")]
        if curves:
            for trial in trials:
                points = self.curves[self.curves["trial_id"] == trial["trial_id"]]
                trial["curves"] = {
                    key: {"step": group["step"].tolist(), "value": group["value"].tolist()}
                    for key, group in points.groupby("key", sort=False)
                }
        head = {
            "experiment": self.experiment_name,
            "sweep": self.sweep,
            "question": self.question,
            "sweep_run_id": self.sweep_run_id,
            "axes": dict(self.axes),
        }
        return json.dumps({**head, "trials": trials}, indent=2, allow_nan=False)


def load_comparison(
    experiment_name: str, tracking_uri: str, sweep: str | None = None, *, curves: pd.DataFrame | None = None
) -> Comparison:
    """Read one sweep of an experiment: the newest, or the newest with the given name or run id.

    curves: the sweep's curves if they are known, which saves most of the time; `NO_CURVES` leaves them out.

    Raises:
        ValueError: there is no such store, experiment or sweep; the message lists those that exist.
    """
    from mlflow import MlflowClient  # takes a second to import, and a comparison that is not loaded does not need it

    from loragrid.tracking.search import EARLIEST_FIRST, search_runs

    path = sqlite_path(tracking_uri)
    if path is not None and not path.exists():
        # MLflow would create an empty store, and the results would seem to be lost.
        raise ValueError(f"there is no MLflow store at {path}; allowed: the tracking URI that `loragrid run` printed")
    with quiet_store():
        client = MlflowClient(tracking_uri=tracking_uri)
        experiment = _find_experiment(client, experiment_name, tracking_uri)
        parent = _find_sweep(client, experiment, sweep)
    children = f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"
    runs = list(search_runs(client, experiment.experiment_id, children, EARLIEST_FIRST))
    reserved = [*IDENTITY_COLUMNS, PHASE_COLUMN, *CLOSING_COLUMNS]
    axes = varying_axes([_parameters(run) for run in runs], reserved, found_in_all([run.data.tags for run in runs]))
    return Comparison(
        experiment_name=experiment_name,
        sweep=str(parent.info.run_name),
        question=parent.data.tags.get(QUESTION_TAG, ""),
        tracking_uri=tracking_uri,
        experiment_id=str(experiment.experiment_id),
        sweep_run_id=str(parent.info.run_id),
        axes=axes,
        methods={_label(run): run.data.tags.get(METHOD_TAG, "") for run in runs},
        table=_build_table(runs, axes),
        curves=_build_curves(client, runs) if curves is None else curves,
        tags={run.data.tags.get(TRIAL_TAG, str(run.info.run_name)): dict(run.data.tags) for run in runs},
        sweep_parameters=dict(parent.data.params),
        sweep_metrics=dict(parent.data.metrics),
    )


def found_in_all(tags: Iterable[Mapping[str, str]]) -> set[str]:
    """Dotted paths of the parameters whose values every trial found in its rows; tags: of each trial's run."""
    found = [set(json.loads(own.get(FOUND_TAG, "[]"))) for own in tags]
    return set.intersection(*found) if found else set()


def _find_experiment(client: "MlflowClient", name: str, tracking_uri: str) -> "Experiment":
    from loragrid.tracking.search import search_experiments

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        names = sorted(other.name for other in search_experiments(client) if other.name != "Default")
        raise ValueError(f"experiment {name!r} is not in {tracking_uri}; there: {', '.join(names) or 'none'}")
    return experiment


def _find_sweep(client: "MlflowClient", experiment: "Experiment", sweep: str | None) -> "Run":
    from loragrid.tracking.search import search_runs

    runs = list(search_runs(client, experiment.experiment_id, f"tags.`{KIND_TAG}` = 'sweep'"))
    if not runs:
        raise ValueError(f"experiment {experiment.name!r} holds no sweep yet")
    for run in runs:
        if sweep is None or sweep in (run.info.run_name, run.info.run_id):
            return run
    names = ", ".join(dict.fromkeys(str(run.info.run_name) for run in runs))
    raise ValueError(f"sweep {sweep!r} is not in experiment {experiment.name!r}; there: {names}")


def _parameters(run: "Run") -> dict[str, Scalar]:
    return {key: parse_parameter(text) for key, text in run.data.params.items()}


def _label(run: "Run") -> str:
    return run.data.tags.get(LABEL_TAG) or run.data.tags.get(METHOD_TAG, "")


def _build_table(runs: "Sequence[Run]", axes: Mapping[str, str]) -> pd.DataFrame:
    found = dict.fromkeys(key for run in runs for key in run.data.metrics if key not in CURVE_METRICS)
    # Known metrics keep the order of `summary_metrics`; metrics that other programs logged follow them.
    known = summary_metrics()
    metric_keys = [key for key in known if key in found] + sorted(set(found) - set(known))
    parameters = [_parameters(run) for run in runs]
    phases = [run.data.tags.get(PHASE_TAG, "tune") for run in runs]
    columns: dict[str, list[Any]] = {
        "trial_id": [run.data.tags.get(TRIAL_TAG, run.info.run_name) for run in runs],
        "status": [run.info.status for run in runs],
        "method": [_label(run) for run in runs],
        **({PHASE_COLUMN: phases} if "confirm" in phases else {}),
        **{name: [row.get(path) for row in parameters] for name, path in axes.items()},
        **{key: [run.data.metrics.get(key) for run in runs] for key in metric_keys},
        "reason": [run.data.tags.get(REASON_TAG, "") for run in runs],
        "run_id": [run.info.run_id for run in runs],
    }
    return pd.DataFrame({name: _column(name, values) for name, values in columns.items()})


def _column(name: str, values: Sequence[Any]) -> "pd.Series[Any]":
    """A column whose integers stay integers if a value is missing. Bytes, steps, parameters and rows are integers."""
    present = [value for value in values if value is not None]
    is_count = name.startswith(("parameters/", "data/")) and not name.endswith("_share")
    if is_count or name.endswith(("_bytes", "/best_step")) or "/steps_" in name:
        values = [None if value is None else round(value) for value in values]
        return pd.Series(values, dtype="Int64")
    if present and all(type(value) is int for value in present):
        return pd.Series(list(values), dtype="Int64")
    if present and all(type(value) in (int, float) for value in present):
        return pd.Series([math.nan if value is None else float(value) for value in values], dtype="float64")
    return pd.Series(list(values), dtype="object")


def _build_curves(client: "MlflowClient", runs: "Sequence[Run]") -> pd.DataFrame:
    rows: list[tuple[str, str, int, str, float]] = []
    for run in runs:
        trial_id = run.data.tags.get(TRIAL_TAG, run.info.run_name)
        method = _label(run)
        for key in curve_keys():
            if key in run.data.metrics:
                points = _last_value_per_step(client.get_metric_history(run.info.run_id, key))
                rows.extend((trial_id, method, step, key, value) for step, value in points)
    return pd.DataFrame(rows, columns=list(NO_CURVES))


def _last_value_per_step(history: "Iterable[Metric]") -> list[tuple[int, float]]:
    """(Step, value) by rising step. A pack that continues from a checkpoint repeats steps; the later value counts."""
    ordered = sorted(history, key=lambda point: (point.step, point.timestamp))
    return list({int(point.step): float(point.value) for point in ordered}.items())


def _json_value(value: Any) -> Any:
    """A cell as JSON can hold it: an infinite figure becomes None."""
    plain = plain_value(value)
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def plain_value(value: Any) -> Any:
    """A cell as a plain Python value: numpy's numbers as Python's, every missing value as None."""
    if is_missing(value):
        return None
    return value.item() if hasattr(value, "item") else value


def sort_by_final_loss(table: pd.DataFrame) -> pd.DataFrame:
    """Finished trials by final evaluation loss, then finished trials without one, then the others."""
    loss = table["eval/final_loss"] if "eval/final_loss" in table else pd.Series(math.nan, index=table.index)
    finished = table["status"] == "FINISHED"
    order = pd.DataFrame({"other": ~finished, "loss": loss.where(finished)})
    return table.loc[order.sort_values(["other", "loss"], kind="stable", na_position="last").index]


def is_stopped_early(row: Mapping[Any, Any]) -> bool:
    """Whether early stopping ended the trial of this row of the table."""
    return row["status"] == "KILLED" and str(row["reason"] or "").startswith(STOPPED_EARLY)
