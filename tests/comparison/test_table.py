"""The comparison contains exactly what MLflow holds."""

import io
import json
from pathlib import Path

import pandas as pd
import pytest

from loragrid.comparison.table import load_comparison, sort_by_final_loss
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import Scalar, default_tracking_uri
from loragrid.trials.tags import LABEL_TAG, QUESTION_TAG


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = default_tracking_uri(str(tmp_path_factory.mktemp("store")), None)
    record_quickstart(uri)
    return uri


def record_quickstart(uri: str) -> None:
    """Four trials with known values: one without lr_ratio, one without a rank, one that failed."""
    recorder = Recorder("quickstart", uri)
    recorder.start_sweep(
        "only", {"grid.method.rank": {"ladder": [4, 8], "points": 2}}, {QUESTION_TAG: "Which is best?"}
    )
    trials: dict[str, tuple[dict[str, Scalar], float | None]] = {
        "lora-a": ({"method.name": "lora", "method.rank": 4, "method.alpha": 16.0, "training.lr": 1e-3}, 2.5),
        "lora_plus-b": (
            {"method.name": "lora_plus", "method.rank": 8, "method.lr_ratio": 16.0, "training.lr": 1e-3},
            2.25,
        ),
        "lora_plus-c": (
            {"method.name": "lora_plus", "method.rank": 8, "method.lr_ratio": 4.0, "training.lr": 1e-3},
            None,
        ),
        "full-d": ({"method.name": "full", "training.lr": 1e-5}, 2.75),
    }
    for trial_id, (parameters, loss) in trials.items():
        fixed: dict[str, Scalar] = {"seed": 0, "model.name": "small", "data.name": "chat", "training.clip_norm": None}
        recorder.start_trial(trial_id, {**parameters, **fixed}, {})
        recorder.log_records(trial_id, [{"step": 0, "train/loss": 4.0, "eval/loss": 3.0}])
        recorder.log_records(trial_id, [{"step": 1, "train/loss": 3.5, "eval/loss": loss}])
        recorder.log_summary(
            trial_id, {"eval/final_loss": loss, "parameters/trainable": 1000, "time/step_seconds": 0.5}
        )
        if loss is None:
            recorder.end_trial(trial_id, "FAILED", "diverged")
        else:
            recorder.log_summary(trial_id, {"memory/peak_allocated_bytes": 2**40 + 1})
            recorder.end_trial(trial_id, "FINISHED")
    recorder.end_sweep("FINISHED")


def test_the_table_has_one_row_per_trial_in_order(uri: str) -> None:
    table = load_comparison("quickstart", uri).table
    assert list(table["trial_id"]) == ["lora-a", "lora_plus-b", "lora_plus-c", "full-d"]
    assert list(table["method"]) == ["lora", "lora_plus", "lora_plus", "full"]
    assert list(table["status"]) == ["FINISHED", "FINISHED", "FAILED", "FINISHED"]
    assert list(table["reason"]) == ["", "", "diverged", ""]


def test_the_columns_are_the_axes_that_vary_and_the_metrics(uri: str) -> None:
    comparison = load_comparison("quickstart", uri)
    assert comparison.axes == {"rank": "method.rank", "lr_ratio": "method.lr_ratio", "lr": "training.lr"}
    assert comparison.metric_keys == [
        "eval/final_loss",
        "parameters/trainable",
        "memory/peak_allocated_bytes",
        "time/step_seconds",
    ]
    assert comparison.question == "Which is best?"
    assert comparison.sweep == "only"
    assert comparison.sweep_parameters == {"grid.method.rank": '{"ladder": [4, 8], "points": 2}'}


def test_values_keep_their_kind_and_what_is_missing_is_missing(uri: str) -> None:
    table = load_comparison("quickstart", uri).table.set_index("trial_id")
    assert table["rank"].dtype == "Int64"
    assert table.loc["lora-a", "rank"] == 4
    assert table["rank"].isna().tolist() == [False, False, False, True]
    assert table["lr_ratio"].isna().tolist() == [True, False, False, True]
    assert table.loc["lora_plus-b", "lr_ratio"] == 16.0
    assert table["eval/final_loss"].isna().tolist() == [False, False, True, False]
    assert table["memory/peak_allocated_bytes"].isna().tolist() == [False, False, True, False]
    assert table.loc["lora-a", "memory/peak_allocated_bytes"] == 2**40 + 1


def test_the_curves_hold_every_point_of_every_trial(uri: str) -> None:
    curves = load_comparison("quickstart", uri).curves
    assert list(curves.columns) == ["trial_id", "method", "step", "key", "value"]
    own = curves[(curves["trial_id"] == "lora_plus-b") & (curves["key"] == "eval/loss")]
    assert list(zip(own["step"], own["value"], strict=True)) == [(0, 3.0), (1, 2.25)]
    failed = curves[(curves["trial_id"] == "lora_plus-c") & (curves["key"] == "eval/loss")]
    assert list(failed["value"]) == [3.0]


def test_tables_hold_the_last_accuracy_and_curves_hold_all(tmp_path: Path) -> None:
    recorder = Recorder("task", default_tracking_uri(str(tmp_path), None))
    recorder.start_sweep("only", {}, {})
    recorder.start_trial("lora-a", {"method.name": "lora"}, {})
    recorder.log_records(
        "lora-a", [{"step": 0, "eval/accuracy": 0.125}, {"step": 5, "eval/accuracy": 0.5, "eval/loss": 2.0}]
    )
    recorder.log_records("lora-a", [{"step": 9, "eval/accuracy": 0.375}])
    assert recorder.deliver()
    comparison = load_comparison("task", recorder.tracking_uri)
    own = comparison.curves[comparison.curves["key"] == "eval/accuracy"]
    assert list(zip(own["step"], own["value"], strict=True)) == [(0, 0.125), (5, 0.5), (9, 0.375)]
    assert comparison.table["eval/accuracy"].tolist() == [0.375]
    assert json.loads(comparison.to_json(curves=True))["trials"][0]["curves"]["eval/accuracy"]["step"] == [0, 5, 9]


def test_steps_that_were_trained_again_count_once(uri: str) -> None:
    seconds = iter(range(1000, 2000))
    recorder = Recorder("resumed", uri, clock=lambda: float(next(seconds)))
    recorder.start_sweep("only", {}, {})
    recorder.start_trial("lora-a", {"method.name": "lora"}, {})
    recorder.log_records("lora-a", [{"step": step, "train/loss": 9.0} for step in range(3)])
    recorder.log_records("lora-a", [{"step": step, "train/loss": 1.0} for step in range(1, 4)])
    assert recorder.deliver()
    curves = load_comparison("resumed", uri).curves
    assert list(zip(curves["step"], curves["value"], strict=True)) == [(0, 9.0), (1, 1.0), (2, 1.0), (3, 1.0)]


def test_axes_with_the_same_last_part_get_their_whole_path(uri: str) -> None:
    recorder = Recorder("names", uri)
    recorder.start_sweep("only", {}, {})
    for seed, (model, data) in enumerate([("m1", "d1"), ("m2", "d1")]):
        parameters: dict[str, Scalar] = {"method.name": "lora", "model.name": model, "data.name": data, "seed": seed}
        recorder.start_trial(f"lora-{seed}", parameters, {})
    assert recorder.deliver()
    comparison = load_comparison("names", uri)
    assert comparison.axes == {"model.name": "model.name", "seed": "seed"}
    assert list(comparison.table["model.name"]) == ["m1", "m2"]


def test_the_newest_sweep_is_read_unless_another_is_named(uri: str) -> None:
    seconds = iter(range(1000, 2000))
    first, second = None, None
    for name in ("first", "second"):
        recorder = Recorder("two", uri, clock=lambda: float(next(seconds)))
        recorder.start_sweep(name, {}, {})
        run_id = recorder.sweep_run_id
        first, second = (run_id, second) if name == "first" else (first, run_id)
        recorder.start_trial(f"trial-of-{name}", {"method.name": "lora"}, {})
        recorder.end_sweep("FINISHED")
    assert list(load_comparison("two", uri).table["trial_id"]) == ["trial-of-second"]
    assert list(load_comparison("two", uri, "first").table["trial_id"]) == ["trial-of-first"]
    assert load_comparison("two", uri, first).sweep == "first"
    assert load_comparison("two", uri).sweep_run_id == second
    with pytest.raises(ValueError, match="'third' is not in experiment 'two'; there: second, first"):
        load_comparison("two", uri, "third")


def test_a_sweep_without_trials_gives_an_empty_table(uri: str) -> None:
    recorder = Recorder("empty", uri)
    with pytest.raises(ValueError, match="'empty' holds no sweep yet"):
        load_comparison("empty", uri)
    recorder.start_sweep("only", {}, {})
    assert recorder.deliver()
    comparison = load_comparison("empty", uri)
    assert comparison.table.empty
    assert comparison.curves.empty
    assert json.loads(comparison.to_json())["trials"] == []


def test_an_unknown_experiment_is_answered_with_those_there_are(uri: str) -> None:
    with pytest.raises(ValueError, match=r"experiment 'quickstrat' is not in .*; there: .*quickstart"):
        load_comparison("quickstrat", uri)


def test_a_missing_store_is_refused_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no MLflow store at .*mlflow\.db"):
        load_comparison("quickstart", default_tracking_uri(str(tmp_path / "absent"), None))
    assert not list(tmp_path.iterdir())


def test_csv_and_json_say_what_the_table_says(uri: str) -> None:
    comparison = load_comparison("quickstart", uri)
    from_csv = pd.read_csv(io.StringIO(comparison.to_csv()))
    assert list(from_csv.columns) == list(comparison.table.columns)
    assert from_csv["eval/final_loss"].tolist()[:2] == [2.5, 2.25]
    assert ",1099511627777," in comparison.to_csv()
    plain = json.loads(comparison.to_json(curves=True))
    assert plain["question"] == "Which is best?"
    assert plain["trials"][0]["rank"] == 4
    assert plain["trials"][2]["eval/final_loss"] is None
    assert plain["trials"][1]["curves"]["eval/loss"] == {"step": [0, 1], "value": [3.0, 2.25]}
    assert "curves" not in json.loads(comparison.to_json())["trials"][0]


def test_trials_are_sorted_by_loss_then_by_status() -> None:
    rows = [
        ("failed-low", "FAILED", 0.5),
        ("none", "FINISHED", None),
        ("killed", "KILLED", 0.25),
        ("high", "FINISHED", 3.0),
        ("low", "FINISHED", 1.0),
    ]
    table = pd.DataFrame(rows, columns=["trial_id", "status", "eval/final_loss"])
    assert list(sort_by_final_loss(table)["trial_id"]) == ["low", "high", "none", "failed-low", "killed"]
    without_losses = table[["trial_id", "status"]]
    assert list(sort_by_final_loss(without_losses)["trial_id"]) == ["none", "high", "low", "failed-low", "killed"]


def test_table_and_curves_call_a_method_by_its_label(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    recorder = Recorder("labels", uri)
    recorder.start_sweep("only", {}, {})
    for trial_id, tags in {"lora-a": {}, "lora-b": {LABEL_TAG: "rsLoRA"}}.items():
        recorder.start_trial(trial_id, {"method.name": "lora", "seed": 0}, tags)
        recorder.log_records(trial_id, [{"step": 0, "eval/loss": 3.0}])
        recorder.end_trial(trial_id, "FINISHED")
    recorder.end_sweep("FINISHED")
    comparison = load_comparison("labels", uri)
    assert list(comparison.table["method"]) == list(comparison.curves["method"]) == ["lora", "rsLoRA"]
    assert comparison.methods == {"lora": "lora", "rsLoRA": "lora"}
