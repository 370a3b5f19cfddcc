"""The summary in a sweep's parent run: how its trials ended, the best trial, the cost, the picture."""

from pathlib import Path

from mlflow import MlflowClient

from loragrid.sweep.summary import BEST_METRIC_TAG, BEST_TRIAL_TAG, SweepCost, record_summary
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import default_tracking_uri
from loragrid.trials.metrics import sweep_metrics
from tests.support.many_trials import record_many


def test_the_sweeps_run_has_counts_best_trial_cost_and_picture(tmp_path: Path) -> None:
    recorder, sweep = record_many(default_tracking_uri(str(tmp_path), None))
    seconds = iter((100.0, 110.0, 130.0, 150.0))
    cost = SweepCost(gpus_per_queue=2, clock=lambda: next(seconds))
    cost.queue_started("a")
    cost.queue_ended("a")
    record_summary(recorder, sweep, cost)
    recorder.end_sweep("FAILED")
    client = MlflowClient(recorder.tracking_uri)
    parent = client.search_runs([recorder.experiment_id], "tags.`loragrid.kind` = 'sweep'")[0]
    assert parent.data.metrics == {
        "sweep/trials_finished": 30.0,
        "sweep/trials_failed": 1.0,
        "sweep/trials_stopped": 1.0,
        "sweep/best_eval_loss": 1.5,
        "sweep/best_test_loss": 1.75,
        "sweep/wall_seconds": 50.0,
        "sweep/gpu_seconds": 40.0,
    }
    assert parent.data.metrics.keys() < sweep_metrics().keys()
    assert parent.data.tags[BEST_TRIAL_TAG] == "lora-5"
    assert parent.data.tags[BEST_METRIC_TAG] == "eval/final_loss"
    (picture,) = client.list_artifacts(parent.info.run_id, "figures")
    assert picture.path == "figures/loss_curves.png"
    content = Path(client.download_artifacts(parent.info.run_id, picture.path, str(tmp_path))).read_bytes()
    assert content.startswith(b"\x89PNG")


def test_the_best_trial_has_the_highest_evaluation_accuracy(tmp_path: Path) -> None:
    recorder = Recorder("task", default_tracking_uri(str(tmp_path), None))
    recorder.start_sweep("task-1", {}, {})
    figures = {
        "lowest-loss": (1.0, 0.5, 0.875),
        "right-most-often": (3.0, 0.75, 0.25),
        "as-often-at-lower-loss": (2.0, 0.75, 0.125),
    }
    for trial_id, (loss, accuracy, on_test) in figures.items():
        recorder.start_trial(trial_id, {"method.name": "lora"}, {})
        recorder.log_records(trial_id, [{"step": 0, "eval/accuracy": 1.0}, {"step": 9, "eval/accuracy": accuracy}])
        recorder.log_summary(trial_id, {"eval/final_loss": loss, "test/accuracy": on_test, "test/loss": loss + 0.5})
        recorder.end_trial(trial_id, "FINISHED")
    record_summary(recorder, "task-1", SweepCost())
    recorder.end_sweep("FINISHED")
    parent = MlflowClient(recorder.tracking_uri).get_run(recorder.sweep_run_id)
    assert parent.data.tags[BEST_TRIAL_TAG] == "as-often-at-lower-loss"
    assert parent.data.tags[BEST_METRIC_TAG] == "eval/accuracy"
    best = {key: value for key, value in parent.data.metrics.items() if "best" in key}
    assert best == {
        "sweep/best_eval_accuracy": 0.75,
        "sweep/best_test_accuracy": 0.125,
        "sweep/best_eval_loss": 2.0,
        "sweep/best_test_loss": 2.5,
    }
    assert best.keys() < sweep_metrics().keys()


def test_the_cost_of_a_resumed_sweep_is_added_up(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    for number in range(2):
        recorder = Recorder("twice", uri)
        if number == 0:
            recorder.start_sweep("twice-1", {}, {})
            recorder.start_trial("lora-0", {"method.name": "lora"}, {})
            recorder.end_trial("lora-0", "FAILED", "a reason")
        else:
            recorder.resume_sweep("twice-1", {})
        seconds = iter((0.0, 30.0))
        record_summary(recorder, "twice-1", SweepCost(clock=lambda seconds=seconds: next(seconds)))  # type: ignore[misc]
        recorder.end_sweep("FAILED")
    client = MlflowClient(uri)
    parent = client.search_runs([recorder.experiment_id], "tags.`loragrid.kind` = 'sweep'")[0]
    assert parent.data.metrics["sweep/wall_seconds"] == 60.0
    assert "sweep/gpu_seconds" not in parent.data.metrics, "it held none"
    assert BEST_TRIAL_TAG not in parent.data.tags
