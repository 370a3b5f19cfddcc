"""What the sweep's driver records when a sweep ends."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from loragrid.callback import RecordingCallback
from loragrid.planning import Lane
from loragrid.recorder import Recorder
from loragrid.tracking import default_tracking_uri
from loragrid.trial_store import TrialStore


@pytest.mark.parametrize(("planned", "status"), [(["lora-1"], "KILLED"), ([], "FINISHED")])
def test_a_sweep_that_was_interrupted_before_it_began_a_trial_is_not_finished(
    tmp_path: Path, planned: list[str], status: str
) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    recorder = Recorder("early", uri)
    recorder.start_sweep("early-1", {}, {})
    run_id = recorder.sweep_run_id
    lane = Lane(lane_id="none", packs=())
    callback = RecordingCallback(
        recorder, TrialStore(str(tmp_path / "trials")), lambda config, trial_id: lane, {}, several_rounds=True
    )
    callback.close(planned)
    assert MlflowClient(tracking_uri=uri).get_run(run_id).info.status == status
