"""Recorded runs, statuses, parameters, metrics, tags and artifacts, as MLflow's own client reads them."""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from loragrid.tracking.pages import tracking_ui_command
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import (
    MAX_TAG_LENGTH,
    card_tags,
    default_tracking_uri,
    format_parameter,
    parse_parameter,
)
from loragrid.trials.metrics import CURVE_METRICS, summary_metrics, sweep_metrics, sweep_note
from loragrid.trials.tags import QUESTION_TAG, REASON_TAG
from loragrid.worker.environment import commit_tags, environment_tags


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests, because MLflow needs seconds to create one. Every test has its own experiment."""
    return default_tracking_uri(str(tmp_path_factory.mktemp("store")), None)


@pytest.fixture
def recorder(uri: str, request: pytest.FixtureRequest) -> Recorder:
    return Recorder(request.node.name, uri)


def read_run(recorder: Recorder, run_id: str) -> Run:
    assert recorder.deliver()
    return MlflowClient(tracking_uri=recorder.tracking_uri).get_run(run_id)


def unnamed(note: str, keys: Iterable[str]) -> list[str]:
    """The metrics that a note names neither by their key nor by their group."""
    return [key for key in keys if f"`{key}`" not in note and f"`{key.partition('/')[0]}/*`" not in note]


def test_a_sweep_is_a_parent_with_a_run_per_trial(recorder: Recorder) -> None:
    recorder.start_sweep("first", {"name": "quickstart"}, {QUESTION_TAG: "Which is best?"})
    for name in ("lora-1", "lora-2"):
        recorder.start_trial(name, {"method.name": "lora", "seed": 0}, {})
    parent, children = recorder.sweep_run_id, list(recorder.run_ids.values())
    client = MlflowClient(tracking_uri=recorder.tracking_uri)
    runs = {run.info.run_id: run for run in client.search_runs([recorder.experiment_id])}
    assert set(runs) == {parent, *children}
    assert [runs[child].data.tags["mlflow.parentRunId"] for child in children] == [parent, parent]
    assert [runs[child].info.run_name for child in children] == ["lora-1", "lora-2"]
    assert runs[children[0]].data.tags["loragrid.method"] == "lora"
    assert runs[children[0]].data.tags["loragrid.sweep"] == "first"
    assert "mlflow.parentRunId" not in runs[parent].data.tags
    note = runs[parent].data.tags["mlflow.note.content"]
    assert "Which is best?" in note
    assert not unnamed(note, {**CURVE_METRICS, **summary_metrics()})


def test_a_note_with_question_and_answer_fits_into_a_tag() -> None:
    question, answer = "Which is best? " * 60, "Take this one. " * 80
    note = sweep_note(question, "an-experiment" * 4, trials="t" * 200, charts="c" * 200, answer=answer)
    assert len(note) < MAX_TAG_LENGTH
    assert not unnamed(note, {**CURVE_METRICS, **summary_metrics(), **sweep_metrics()})


def test_every_run_gets_the_status_it_ended_with(recorder: Recorder) -> None:
    recorder.start_sweep("first", {}, {})
    for name in ("done", "broken", "left-open"):
        recorder.start_trial(name, {}, {})
    parent, ids = recorder.sweep_run_id, recorder.run_ids
    recorder.end_trial("done", "FINISHED")
    recorder.end_trial("broken", "FAILED", "diverged: train/loss is NaN at step 3")
    assert read_run(recorder, ids["left-open"]).info.status == "RUNNING"
    recorder.end_sweep("FINISHED")
    runs = {name: read_run(recorder, run_id) for name, run_id in ids.items()}
    assert {name: run.info.status for name, run in runs.items()} == {
        "done": "FINISHED",
        "broken": "FAILED",
        "left-open": "KILLED",
    }
    assert all(run.info.end_time is not None for run in runs.values())
    assert runs["broken"].data.tags[REASON_TAG] == "diverged: train/loss is NaN at step 3"
    assert "NaN at step 3" in runs["broken"].data.tags["mlflow.note.content"]
    assert REASON_TAG not in runs["done"].data.tags
    assert read_run(recorder, parent).info.status == "FINISHED"


def test_parameters_read_back_as_the_values_they_were(recorder: Recorder) -> None:
    parameters = {
        "method.name": "lora",
        "method.rank": 8,
        "method.alpha": 16.0,
        "method.rslora": False,
        "training.lr": 1e-5,
        "training.clip_norm": None,
        **{f"data.columns.{i}": i for i in range(150)},  # more than one MLflow batch
    }
    recorder.start_sweep("first", {"methods": [{"name": "lora"}]}, {})
    recorder.start_trial("lora-1", parameters, {})
    run = read_run(recorder, recorder.run_ids["lora-1"])
    assert {key: parse_parameter(text) for key, text in run.data.params.items()} == parameters
    assert type(parse_parameter(run.data.params["method.rank"])) is int
    assert type(parse_parameter(run.data.params["method.alpha"])) is float
    assert format_parameter(["q_proj", "v_proj"]) == '["q_proj", "v_proj"]'


def test_what_was_not_measured_is_missing(recorder: Recorder) -> None:
    recorder.start_sweep("first", {}, {})
    recorder.start_trial("lora-1", {}, {})
    run_id = recorder.run_ids["lora-1"]
    losses = (2.0, None, math.nan, math.inf, 1.5)
    recorder.log_records("lora-1", [{"step": step, "train/loss": loss} for step, loss in enumerate(losses)])
    recorder.log_summary("lora-1", {"parameters/trainable": 460_800, "memory/peak_allocated_bytes": None})
    assert recorder.deliver()
    history = MlflowClient(tracking_uri=recorder.tracking_uri).get_metric_history(run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(0, 2.0), (4, 1.5)]
    assert read_run(recorder, run_id).data.metrics == {"train/loss": 1.5, "parameters/trainable": 460_800.0}


def test_points_have_their_records_time_or_the_clocks(uri: str) -> None:
    recorder = Recorder("clock", uri, clock=lambda: 1000.0)
    recorder.start_sweep("first", {}, {})
    recorder.start_trial("lora-1", {}, {})
    run_id = recorder.run_ids["lora-1"]
    recorder.log_records("lora-1", [{"step": 0, "train/loss": 2.0, "timestamp": 900.5}, {"step": 1, "train/loss": 1.0}])
    assert recorder.deliver()
    history = MlflowClient(tracking_uri=uri).get_metric_history(run_id, "train/loss")
    assert sorted((point.step, point.timestamp) for point in history) == [(0, 900_500), (1, 1_000_000)]
    assert "timestamp" not in read_run(recorder, run_id).data.metrics


@pytest.mark.heavy
def test_64_trials_of_250_steps_are_recorded_whole(recorder: Recorder) -> None:
    # 64,000 points: each trial's batch is exactly as large as MLflow accepts, and one more point needs a second batch.
    recorder.start_sweep("large", {}, {})
    keys = tuple(CURVE_METRICS)
    records = [{"step": step, **dict.fromkeys(keys, 1.0 / (step + 1))} for step in range(250)]
    for number in range(64):
        recorder.start_trial(f"lora-{number}", {"seed": number}, {})
        recorder.log_records(f"lora-{number}", [*records, {"step": 250, "eval/loss": 0.5}])
        recorder.end_trial(f"lora-{number}", "FINISHED")
    recorder.end_sweep("FINISHED")
    client = MlflowClient(tracking_uri=recorder.tracking_uri)
    for number in (0, 63):
        for key in keys:
            points = client.get_metric_history(recorder.run_ids[f"lora-{number}"], key)
            assert sorted(point.step for point in points) == list(range(250 + (key == "eval/loss")))


def test_artifacts_are_beside_the_store(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "made" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    recorder.start_sweep("first", {}, {})
    recorder.start_trial("lora-1", {}, {})
    run_id = recorder.run_ids["lora-1"]
    recorder.log_artifacts("lora-1", folder, "adapter")
    recorder.log_sweep_artifact(folder / "adapter_config.json")
    assert recorder.deliver()
    client = MlflowClient(tracking_uri=recorder.tracking_uri)
    assert [file.path for file in client.list_artifacts(run_id, "adapter")] == ["adapter/adapter_config.json"]
    assert [file.path for file in client.list_artifacts(recorder.sweep_run_id)] == ["adapter_config.json"]
    assert os.listdir(tmp_path) == ["made"]
    store = Path(recorder.tracking_uri.removeprefix("sqlite:///")).parent
    assert read_run(recorder, run_id).info.artifact_uri.startswith((store / "artifacts").as_uri())


def test_the_fluent_global_run_is_never_touched(recorder: Recorder) -> None:
    before = mlflow.get_tracking_uri()
    recorder.start_sweep("first", {}, {})
    recorder.start_trial("lora-1", {}, {})
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == before


def test_a_second_sweep_goes_into_the_same_experiment(uri: str) -> None:
    recorders = [Recorder("shared", uri) for _ in range(2)]
    assert recorders[0].experiment_id == recorders[1].experiment_id


def test_sweeps_are_numbered_and_a_number_is_never_given_twice(recorder: Recorder) -> None:
    client = MlflowClient(tracking_uri=recorder.tracking_uri)
    names = []
    for _ in range(3):
        names.append(recorder.next_sweep_name())
        recorder.start_sweep(names[-1], {}, {})
        run_id = recorder.sweep_run_id
        recorder.start_trial(f"lora-{len(names)}", {}, {})
        recorder.end_sweep("FINISHED")
        client.delete_run(run_id)
    assert names == [f"{recorder.experiment_name}-{number}" for number in (1, 2, 3)]


def test_a_deleted_experiment_is_refused_with_the_restore_command(uri: str) -> None:
    recorder = Recorder("gone", uri)
    MlflowClient(tracking_uri=uri).delete_experiment(recorder.experiment_id)
    with pytest.raises(ValueError, match=f"'gone' is deleted.*restore --experiment-id {recorder.experiment_id}"):
        Recorder("gone", uri)


def test_calls_in_the_wrong_order_are_refused(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match="no sweep is open"):
        recorder.start_trial("lora-1", {}, {})
    recorder.start_sweep("first", {}, {})
    with pytest.raises(ValueError, match="'first' is still open"):
        recorder.start_sweep("second", {}, {})
    recorder.start_trial("lora-1", {}, {})
    with pytest.raises(ValueError, match="already started"):
        recorder.start_trial("lora-1", {}, {})
    with pytest.raises(ValueError, match="'lora-2' was never started; started: lora-1"):
        recorder.log_summary("lora-2", {})
    recorder.end_trial("lora-1", "FINISHED")
    with pytest.raises(ValueError, match="already ended"):
        recorder.end_trial("lora-1", "FINISHED")


def test_text_too_long_for_mlflow_is_cut_with_a_mark(recorder: Recorder) -> None:
    recorder.start_sweep("first", {}, {})
    recorder.start_trial("lora-1", {"method.note": "x" * 9000}, {})
    run_id = recorder.run_ids["lora-1"]
    recorder.end_trial("lora-1", "FAILED", "y" * 9000)
    run = read_run(recorder, run_id)
    assert run.data.params["method.note"] == "x" * 5999 + "…"
    assert run.data.tags[REASON_TAG] == "y" * 7999 + "…"


@pytest.mark.heavy
def test_the_first_start_of_a_store_prints_nothing(tmp_path: Path) -> None:
    code = (
        "from loragrid.tracking.recorder import Recorder\n"
        "from loragrid.tracking.store_uri import default_tracking_uri\n"
        f"uri = default_tracking_uri({str(tmp_path / 'new' / 'store')!r}, None)\n"
        "Recorder('quiet', uri).start_sweep('first', {}, {})"
    )
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(os.listdir(tmp_path)) == ["new"]


def test_tracking_uri_prefers_config_then_environment_then_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri(str(tmp_path), None) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_tracking_uri(str(tmp_path), None) == "http://tracking:5000"
    assert default_tracking_uri(str(tmp_path), "https://other") == "https://other"


@pytest.mark.parametrize("folder", ["mlruns", "./mlruns", "/data/mlruns", "file:///data/mlruns"])
def test_a_plain_folder_as_tracking_uri_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"tracking\.uri: '.*mlruns' is a folder.*allowed: .*sqlite:"):
        default_tracking_uri("store", folder)


def test_a_remote_storage_path_needs_a_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match=r"storage\.path: 's3://bucket/runs' is remote.*tracking\.uri"):
        default_tracking_uri("s3://bucket/runs", None)


def test_the_ui_command_serves_a_store_and_refuses_a_server() -> None:
    command = tracking_ui_command("sqlite:////data/mlflow.db", "127.0.0.1", 5001)
    assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
    assert command[command.index("--backend-store-uri") + 1] == "sqlite:////data/mlflow.db"
    assert command[command.index("--port") + 1] == "5001"
    with pytest.raises(ValueError, match="http://tracking:5000 is a server"):
        tracking_ui_command("http://tracking:5000")


def test_a_card_becomes_one_tag_per_field() -> None:
    @dataclasses.dataclass(frozen=True)
    class PaperCard:
        title: str = "LoRA"
        year: int = 2021
        differences: str = ""

    assert card_tags(PaperCard()) == {"loragrid.card.title": "LoRA", "loragrid.card.year": "2021"}


def test_the_environment_is_recorded_without_host_or_user_name() -> None:
    tags = environment_tags()
    for package in ("python", "torch", "transformers", "ray", "mlflow", "loragrid"):
        assert tags[f"loragrid.version.{package}"]
    assert tags["loragrid.version.mlflow"] == mlflow.__version__
    assert int(tags["loragrid.cpu.num_cores"]) >= 1
    values = " ".join(tags.values())
    assert os.uname().nodename not in values
    assert all(isinstance(value, str) for value in tags.values())


def test_the_commit_is_that_of_the_codes_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    assert commit_tags(package) == {}
    (package / "code.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert commit_tags(package) == {"mlflow.source.git.commit": commit, "loragrid.git.dirty": "false"}
    (package / "code.py").write_text("2")
    changed = commit_tags(package)
    assert changed["loragrid.git.dirty"] == "true"
    (package / "code.py").write_text("3")
    assert commit_tags(package)["loragrid.git.changes"] != changed["loragrid.git.changes"], "unequal changes differ"
    (tmp_path / ".venv").mkdir()  # an installed copy inside somebody else's checkout
    (tmp_path / ".venv" / "code.py").write_text("1")
    assert commit_tags(tmp_path / ".venv") == {}
