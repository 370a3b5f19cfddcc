"""A sweep is resumed only on the rows that its trials had."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loragrid as lg
from loragrid.data.dataset import TokenizedData
from loragrid.data.record import data_tags
from loragrid.planning.plan import Plan, plan
from loragrid.planning.rows import read_rows
from loragrid.sweep.record import open_recorder
from loragrid.sweep.resume import refuse_other_rows
from loragrid.tracking.previous_run import PreviousSweep, RecordedRows
from loragrid.trials.outcome import SweepOutcome
from loragrid.trials.tags import DATA_DIGEST_TAG, MADE_FROM_TAG
from tests.support.sweep_results import assert_succeeded

ROWS = [{"prompt": f"Question {n}:", "completion": f" answer {n}", "topic": n % 8} for n in range(40)]


@pytest.fixture
def settings(valid_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))
    data = {"name": write(tmp_path, ROWS), "max_length": 64, "num_eval": 4}
    return valid_experiment | {"data": data, "storage": {"path": str(tmp_path / "store")}}


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(the_plan: Plan) -> dict[Any, TokenizedData]:
    return dict(read_rows(the_plan.trials).tokenized)


def record(settings: dict[str, Any]) -> None:
    """Records all trials of the experiment in MLflow as finished on their rows."""
    experiment = lg.Experiment(**settings)
    the_plan = plan(experiment)
    tokenized = rows_of(the_plan)
    recorder = open_recorder(experiment)
    recorder.start_sweep("valid-1", {}, {})
    for trial in the_plan.trials:
        recorder.start_trial(trial.trial_id, {}, data_tags(tokenized[(trial.model, trial.data)]))
        recorder.end_trial(trial.trial_id, "FINISHED")
    recorder.end_sweep("FINISHED")


def as_recorded(settings: dict[str, Any]) -> PreviousSweep:
    """What `find_previous` reads of a sweep whose trials were all trained."""
    the_plan = plan(lg.Experiment(**settings))
    tokenized = rows_of(the_plan)
    rows = {}
    for trial in the_plan.trials:
        tags = data_tags(tokenized[(trial.model, trial.data)])
        made_from = json.loads(tags[MADE_FROM_TAG])
        rows[trial.trial_id] = RecordedRows(digest=tags[DATA_DIGEST_TAG], made_from=made_from)
    outcome = SweepOutcome(statuses=dict.fromkeys(rows, "FINISHED"))
    common: dict[str, Any] = {"trials": "", "num_resumed": 0, "is_finished": True, "begun": {}}
    return PreviousSweep(name="valid-1", outcome=outcome, rows=rows, **common)


def resume(previous: PreviousSweep, settings: dict[str, Any]) -> None:
    the_plan = plan(lg.Experiment(**settings))
    refuse_other_rows(previous, the_plan, rows_of(the_plan))


def with_data(settings: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return settings | {"data": settings["data"] | keys}


def test_a_sweep_on_unchanged_rows_is_resumed(settings: dict[str, Any]) -> None:
    record(settings)
    assert_succeeded(lg.run(lg.Experiment(**settings), resume=True))


def test_a_changed_file_is_refused_with_both_digests(settings: dict[str, Any], tmp_path: Path) -> None:
    record(settings)
    before = next(iter(as_recorded(settings).rows.values())).digest
    write(tmp_path, ROWS[1:])
    now = next(iter(as_recorded(settings).rows.values())).digest
    message = rf"--resume: valid-1: .*{before}, now {now}.*changed: the content of the data \(.*allowed: a new sweep"
    with pytest.raises(ValueError, match=message):
        lg.run(lg.Experiment(**settings), resume=True)


def test_one_changed_file_of_several_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        write(folder, [{"prompt": f"{number} {n}", "completion": " yes"} for n in range(4)])
    two = settings | {"grid": {"data.eval_name": [str(folder / "rows.jsonl") for folder in folders]}}
    previous = as_recorded(two)
    resume(previous, two)
    write(folders[1], [{"prompt": f"new {n}", "completion": " yes"} for n in range(4)])
    with pytest.raises(ValueError, match="the content of the data"):
        resume(previous, two)


@pytest.mark.parametrize("keys", [{"group_by": "topic"}, {"loss_on": "all"}, {"num_eval": 5}])
def test_other_keys_of_the_split_are_refused_by_name(settings: dict[str, Any], keys: dict[str, Any]) -> None:
    (key,) = keys
    with pytest.raises(ValueError, match=rf"what changed: data\.{key} \("):
        resume(as_recorded(settings), with_data(settings, **keys))


def test_keys_that_change_no_row_are_no_reason(settings: dict[str, Any]) -> None:
    resume(as_recorded(settings), with_data(settings, max_length=60))


def test_rows_of_other_versions_are_refused_with_the_reason(settings: dict[str, Any]) -> None:
    previous = as_recorded(settings)
    for made_from, reason in (
        ({"format": 2}, r"LoraGrid's rule by which rows are split .*\(2 then, 3 now\)"),
        ({}, "the sweep is older than groups of rows"),
    ):
        rows = {trial: RecordedRows(digest="sha256:0", made_from=made_from) for trial in previous.rows}
        with pytest.raises(ValueError, match=reason):
            resume(replace(previous, rows=rows), settings)


def test_trials_without_recorded_rows_do_not_matter(settings: dict[str, Any]) -> None:
    resume(replace(as_recorded(settings), rows={}), settings)


def test_a_data_set_can_be_added_or_dropped(settings: dict[str, Any]) -> None:
    data = {key: value for key, value in settings["data"].items() if key != "num_eval"}
    two = settings | {"data": data, "grid": {"data.num_eval": [4, 5]}}
    resume(as_recorded(settings), two)
    resume(as_recorded(two), settings)
    with pytest.raises(ValueError, match=r"data\.num_eval"):
        resume(as_recorded(two), with_data(settings, num_eval=6))
