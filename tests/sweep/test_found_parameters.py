"""What trials find in their rows is recorded as used, is no axis of the comparison, and guards a resumed sweep."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import loragrid as lg
from loragrid.comparison.experiment_file import rebuild_experiment
from loragrid.comparison.table import Comparison, load_comparison
from loragrid.data.record import data_tags
from loragrid.planning.dry_run import prepare
from loragrid.sweep.record import open_recorder, sweep_parameters
from loragrid.sweep.resume import refuse_other_rows
from loragrid.sweep.run import run
from loragrid.sweep.storage import trial_store
from loragrid.sweep.sweep_writer import SweepWriter
from loragrid.tracking.previous_run import find_previous
from loragrid.tracking.store_uri import default_tracking_uri, format_parameter


def record(settings: dict[str, Any]) -> Comparison:
    """Records a sweep whose trials have begun on their rows, as the driver does."""
    experiment = lg.Experiment(**settings)
    the_plan, rows = prepare(experiment)
    recorder = open_recorder(experiment)
    recorder.start_sweep("valid-1", sweep_parameters(experiment, the_plan.trials), {})
    writer = SweepWriter(recorder, trial_store(experiment, "valid-1"), {})
    writer.start(the_plan.trials, "pack-000")
    for trial in the_plan.trials:
        recorder.tag_trial(trial.trial_id, data_tags(rows.tokenized[(trial.model, trial.data)]))
    writer.close()
    return load_comparison(experiment.name, recorder.tracking_uri)


def parameters_of(comparison: Comparison) -> list[dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=comparison.tracking_uri)
    return [dict(client.get_run(run_id).data.params) for run_id in comparison.table["run_id"]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all sweeps of these tests, because making one takes seconds."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def in_epochs(
    valid_experiment: dict[str, Any], tmp_path: Path, store: Path, request: pytest.FixtureRequest
) -> dict[str, Any]:
    path = tmp_path / "own.jsonl"
    path.write_bytes(Path(valid_experiment["data"]["name"]).read_bytes())
    own = {
        "name": request.node.name,
        "storage": {"path": str(store)},
        "data": valid_experiment["data"] | {"name": str(path)},
        "training": {"epochs": 2, "warmup_ratio": 0.1, "batch_size": 4},
        "methods": ["lora", {"name": "vera", "rank": 4, "batch_size": 8}],
    }
    return valid_experiment | own


def test_parameters_hold_the_numbers_really_used(in_epochs: dict[str, Any]) -> None:
    comparison = record(in_epochs)
    keys = ("training.epochs", "training.steps", "training.warmup_steps", "data.num_train")
    assert [[found[key] for key in keys] for found in parameters_of(comparison)] == [
        ["2.0", "44", "5", "88"],
        ["2.0", "22", "3", "88"],
    ]
    assert comparison.sweep_parameters["data.num_train"] == "88"
    assert comparison.sweep_parameters["training.steps"] == "null"


def test_a_found_number_is_no_axis(in_epochs: dict[str, Any], tmp_path: Path, chat_jsonl: Path) -> None:
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(chat_jsonl.open(encoding="utf-8").readlines()[:50]), encoding="utf-8")
    in_epochs["grid"] = {"data.name": [in_epochs["data"]["name"], str(fewer)]}
    comparison = record(in_epochs)
    assert {found["data.num_train"] for found in parameters_of(comparison)} == {"88", "42"}
    assert set(comparison.axes.values()) == {"method.rank", "training.batch_size", "data.name"}


def test_epochs_that_vary_are_the_axis(in_epochs: dict[str, Any]) -> None:
    del in_epochs["training"]["epochs"]
    in_epochs |= {"methods": ["lora"], "grid": {"training.epochs": [1, 2], "training.warmup_ratio": [0, 0.1]}}
    in_epochs["training"].pop("warmup_ratio")
    assert set(record(in_epochs).axes.values()) == {"training.epochs", "training.warmup_ratio"}


def test_a_number_that_only_some_trials_find_is_an_axis(in_epochs: dict[str, Any]) -> None:
    in_epochs |= {"methods": ["lora"], "grid": {"data.num_train": [16, None]}}
    assert record(in_epochs).axes["num_train"] == "data.num_train"


def test_the_recorded_parameters_repeat_the_experiment(in_epochs: dict[str, Any]) -> None:
    in_epochs["methods"] = ["lora"]
    experiment = lg.Experiment(**in_epochs)
    the_plan, rows = prepare(experiment)
    recorded = {key: format_parameter(value) for key, value in sweep_parameters(experiment, the_plan.trials).items()}
    assert recorded["training.steps"] == "44"
    text = rebuild_experiment(recorded)
    assert text is not None
    again, rows_again = prepare(lg.Experiment(**yaml.safe_load(text)))
    assert [trial.training for trial in again.trials] == [trial.training for trial in the_plan.trials]
    digests = [{data.digest for data in found.tokenized.values()} for found in (rows, rows_again)]
    assert digests[0] == digests[1]


def test_a_sweep_in_epochs_is_not_resumed_on_more_rows(
    in_epochs: dict[str, Any], tmp_path: Path, chat_jsonl: Path
) -> None:
    """One of two data sets grows: its trials would be new ones, beside those of before."""
    path = Path(in_epochs["data"]["name"])
    in_epochs["grid"] = {"data.name": [str(path), str(chat_jsonl)]}
    path.write_text("".join(path.open(encoding="utf-8").readlines()[:60]), encoding="utf-8")
    record(in_epochs)
    experiment = lg.Experiment(**in_epochs)
    uri = default_tracking_uri(experiment.storage.path, None)
    previous = find_previous(experiment.name, uri, None)
    assert previous is not None
    the_plan, rows = prepare(experiment)
    refuse_other_rows(previous, the_plan, rows.tokenized)
    path.write_bytes(chat_jsonl.read_bytes() + b'{"prompt": "And now?", "completion": " More."}\n')
    grown, rows = prepare(experiment)
    assert {t.trial_id for t in grown.trials} != {t.trial_id for t in the_plan.trials}
    with pytest.raises(ValueError, match="the content of the data"):
        refuse_other_rows(previous, grown, rows.tokenized)
    with pytest.raises(ValueError, match=r"--resume: .*the content of the data"):
        run(experiment, resume=True)
