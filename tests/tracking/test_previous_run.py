"""The progress of a sweep's previous run is read correctly, even if users changed its runs on MLflow's pages."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import loragrid as lg
from loragrid.sweep.record import open_recorder
from loragrid.sweep.storage import trial_store
from loragrid.tracking.previous_run import find_previous
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import default_tracking_uri
from loragrid.trials.outcome import INVARIANT_VIOLATED
from tests.support.sweep_results import assert_succeeded


def test_a_renamed_sweep_is_found_by_its_first_name(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    recorder = Recorder("renamed", uri)
    recorder.start_sweep("renamed-1", {}, {})
    MlflowClient(tracking_uri=uri).update_run(recorder.sweep_run_id, name="the best/so far")
    recorder.end_sweep("KILLED")
    for asked in (None, "renamed-1", "the best/so far"):
        earlier = find_previous("renamed", uri, asked)
        assert earlier is not None
        assert earlier.name == "renamed-1"


def test_resume_ends_sweeps_whose_driver_died_after_the_last_trial(
    valid_experiment: dict[str, Any], tmp_path: Path
) -> None:
    experiment = lg.Experiment(**valid_experiment | {"storage": {"path": str(tmp_path)}})
    recorder = open_recorder(experiment)
    recorder.start_sweep("valid-1", {}, {})
    run_id = recorder.sweep_run_id
    store = trial_store(experiment, "valid-1")
    for trial in lg.plan(experiment).trials:
        recorder.start_trial(trial.trial_id, {}, {})
        recorder.end_trial(trial.trial_id, "FINISHED")
        store.mark_ended(trial.trial_id)
    assert recorder.deliver()
    recorder._outbox.spool.close()  # as the system does if the program is killed
    result = lg.run(experiment, resume=True)
    assert_succeeded(result)
    assert MlflowClient(tracking_uri=result.tracking_uri).get_run(run_id).info.status == "FINISHED"
    assert not Path(store.uri).exists(), "nothing is kept of a sweep that is done"


@pytest.mark.parametrize(("reason", "last_step"), [(f"{INVARIANT_VIOLATED}: 'wte' has changed", -1), ("disk full", 4)])
def test_a_spoiled_trial_starts_over_without_its_old_curve(tmp_path: Path, reason: str, last_step: int) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    recorder = Recorder("spoiled", uri)
    recorder.start_sweep("spoiled-1", {}, {})
    recorder.start_trial("t", {}, {})
    recorder.log_records("t", [{"step": step, "eval/loss": 0.1, "forgetting/loss": 0.2} for step in (0, 4)])
    recorder.end_trial("t", "FAILED", reason)
    recorder.end_sweep("FAILED")
    earlier = find_previous("spoiled", uri, None)
    assert earlier is not None
    assert earlier.begun["t"].last_step == last_step
    for key in ("eval/loss", "forgetting/loss"):
        steps = [record["step"] for record in earlier.begun["t"].evaluations if key in record]
        assert steps == ([] if last_step < 0 else [0, 4])
