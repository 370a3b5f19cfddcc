"""How far an earlier sweep has come, whatever was done to its runs on MLflow's pages since."""

from pathlib import Path

from mlflow import MlflowClient

from loragrid.earlier import find_earlier
from loragrid.recorder import Recorder
from loragrid.tracking import default_tracking_uri


def test_a_sweep_whose_run_was_renamed_is_found_under_the_name_of_its_states(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    recorder = Recorder("renamed", uri)
    recorder.start_sweep("renamed-1", {}, {})
    MlflowClient(tracking_uri=uri).update_run(recorder.sweep_run_id, name="the best/so far")
    recorder.end_sweep("KILLED")
    for asked in (None, "renamed-1", "the best/so far"):
        earlier = find_earlier("renamed", uri, asked)
        assert earlier is not None
        assert earlier.name == "renamed-1"
