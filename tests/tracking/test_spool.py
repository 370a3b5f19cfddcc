"""If MLflow fails during a sweep, the record is kept in order, and is delivered completely and only once."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

import loragrid.tracking.delivery
import loragrid.tracking.recorder
import loragrid.tracking.spool
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.spool import Spool, SpoolInUseError
from loragrid.tracking.store_uri import default_tracking_uri
from loragrid.tracking.sync import sync
from loragrid.trials.tags import KIND_TAG, REASON_TAG, TRIAL_TAG
from tests.support.mounts import can_mount, small_disk

NUM_STEPS = 30
START_SECONDS = 240.0
"""For MLflow's server on a busy machine; on an idle one it takes ten seconds."""
NO_WAIT_SECONDS = 10.0
"""Writing to the spool takes milliseconds; waiting for MLflow once per operation would take more than twice this."""


class Server:
    """A real MLflow server that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}", "--workers", "1"]
        command += ["--artifacts-destination", (self.folder / "artifacts").as_uri()]
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    found.start()
    yield found
    found.kill()


def record(recorder: Recorder, steps: range) -> None:
    for step in steps:
        recorder.log_records("lora-1", [{"step": step, "train/loss": 1.0 / (1 + step)}])


def assert_whole(uri: str, experiment_id: str, steps: range) -> None:
    """One sweep, one trial, every step once and in order."""
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([experiment_id])
    (trial,) = (run for run in runs if TRIAL_TAG in run.data.tags)
    (parent,) = (run for run in runs if run.data.tags[KIND_TAG] == "sweep")
    history = client.get_metric_history(trial.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1.0 / (1 + step)) for step in steps]
    assert (trial.info.status, parent.info.status) == ("FAILED", "FINISHED")
    assert trial.data.tags[REASON_TAG] == "on purpose"
    assert trial.data.params == {"seed": "0"}
    assert [file.path for file in client.list_artifacts(trial.info.run_id, "adapter")] == ["adapter/file.txt"]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "file.txt").write_text("weights")
    return folder


@pytest.mark.heavy
def test_a_restarted_server_gets_everything_once_without_delaying_the_sweep(
    server: Server, tmp_path: Path, artifact: Path
) -> None:
    said: list[str] = []
    recorder = Recorder("away", server.uri, spool_folder=tmp_path / "spool", notify=said.append)
    recorder.start_sweep("away-1", {}, {})
    recorder.start_trial("lora-1", {"seed": 0}, {})
    record(recorder, range(10))
    server.kill()
    start = time.monotonic()
    record(recorder, range(10, 20))
    recorder.log_artifacts("lora-1", artifact, "adapter")
    recorder.end_trial("lora-1", "FAILED", "on purpose")
    assert time.monotonic() - start < NO_WAIT_SECONDS, "recording waited for the server"
    for _ in range(1200):
        if said:
            break
        time.sleep(0.1)
    assert "does not answer" in said[0]
    server.start()
    assert recorder.deliver()
    recorder.end_sweep("FINISHED")
    assert recorder.is_delivered
    assert said[1:] == ["MLflow answers again"]
    assert_whole(server.uri, recorder.experiment_id, range(20))
    assert not list((tmp_path / "spool").glob("*")), "delivered records are deleted"


@pytest.mark.heavy
def test_a_lost_server_costs_bounded_time_and_sync_delivers(
    server: Server, tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loragrid.tracking.recorder, "PATIENCE_SECONDS", 2.0)
    recorder = Recorder("gone", server.uri, spool_folder=tmp_path / "spool")
    recorder.start_sweep("gone-1", {}, {})
    recorder.start_trial("lora-1", {"seed": 0}, {})
    record(recorder, range(NUM_STEPS))
    server.kill()
    recorder.log_artifacts("lora-1", artifact, "adapter")
    recorder.end_trial("lora-1", "FAILED", "on purpose")
    start = time.monotonic()
    recorder.end_sweep("FINISHED")
    assert time.monotonic() - start < 60
    assert not recorder.is_delivered
    with pytest.raises(ValueError, match=f"{server.uri} did not accept the record of gone-1"):
        sync(tmp_path / "spool")
    server.start()
    (number,) = sync(tmp_path / "spool").values()
    assert number >= 3
    assert_whole(server.uri, recorder.experiment_id, range(NUM_STEPS))
    assert sync(tmp_path / "spool") == {}


def test_a_locked_database_delays_the_record_without_loss(tmp_path: Path, artifact: Path) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    recorder = Recorder("locked", uri, spool_folder=tmp_path / "spool")
    recorder.start_sweep("locked-1", {}, {})
    recorder.start_trial("lora-1", {"seed": 0}, {})
    assert recorder.deliver()
    other = sqlite3.connect(tmp_path / "store" / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    record(recorder, range(NUM_STEPS))
    recorder.log_artifacts("lora-1", artifact, "adapter")
    recorder.end_trial("lora-1", "FAILED", "on purpose")
    assert time.monotonic() - start < NO_WAIT_SECONDS, "recording waited for the lock"
    time.sleep(2)
    other.rollback()
    other.close()
    recorder.end_sweep("FINISHED")
    assert recorder.is_delivered
    assert_whole(uri, recorder.experiment_id, range(NUM_STEPS))


def test_records_of_a_killed_program_are_delivered_even_twice(tmp_path: Path, artifact: Path) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    code = f"""
import os
from pathlib import Path
from loragrid.tracking.recorder import Recorder
recorder = Recorder("killed", {uri!r}, spool_folder=Path({str(tmp_path / "spool")!r}))
recorder.start_sweep("killed-1", {{}}, {{}})
recorder.start_trial("lora-1", {{"seed": 0}}, {{}})
for step in range({NUM_STEPS}):
    recorder.log_records("lora-1", [{{"step": step, "train/loss": 1.0 / (1 + step)}}])
recorder.log_artifacts("lora-1", Path({str(artifact)!r}), "adapter")
assert recorder.deliver()
recorder.end_trial("lora-1", "FAILED", "on purpose")
recorder._outbox.end_run("", "FINISHED", recorder._clock.now())
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "spool" / "killed-1"
    experiment_id = Recorder("killed", uri).experiment_id
    # The files of the artifact operation were deleted at its delivery, so it cannot be delivered twice.
    lines = [line for line in (folder / "operations.jsonl").read_bytes().splitlines() if b'"artifacts"' not in line]
    (folder / "operations.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with (folder / "operations.jsonl").open("ab") as stream:
        stream.write(b'{"do": "metrics", "run": "lora-1", "poi')  # killed in the middle of a line
    (folder / "position").write_bytes(b"%020d" % 0)  # as after a kill before the first delivery was noted
    assert sync(tmp_path / "spool")["killed-1"] >= NUM_STEPS
    assert_whole(uri, experiment_id, range(NUM_STEPS))


def test_refused_operations_are_put_aside_and_the_rest_arrives(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    recorder = Recorder("refused", uri, spool_folder=tmp_path / "spool")
    recorder.start_sweep("refused-1", {}, {})
    recorder.start_trial("lora-1", {}, {})
    recorder.log_records("lora-1", [{"step": 0, "no such name?!": 1.0}])
    recorder.log_records("lora-1", [{"step": 1, "train/loss": 2.0}])
    recorder.end_trial("lora-1", "FINISHED")
    run_id = recorder.run_ids["lora-1"]
    recorder.end_sweep("FINISHED")
    assert recorder.is_delivered
    run = MlflowClient(tracking_uri=uri).get_run(run_id)
    assert (run.data.metrics, run.info.status) == ({"train/loss": 2.0}, "FINISHED")
    aside = (tmp_path / "spool" / "refused-1" / "refused.jsonl").read_text()
    assert "no such name?!" in aside
    assert aside.count("\n") == 1


def test_a_spool_belongs_to_one_program_at_a_time(tmp_path: Path) -> None:
    first = Spool(tmp_path / "a", {"experiment": "a"})
    with pytest.raises(SpoolInUseError, match="still running"):
        Spool(tmp_path / "a")
    first.append({"do": "reopen", "run": ""})
    first.close()
    second = Spool(tmp_path / "a")
    assert second.head == {"experiment": "a"}
    assert [operation for _, operation in second.pending()] == [{"do": "reopen", "run": ""}]


def test_a_delivered_file_is_emptied_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loragrid.tracking.spool, "MAX_DELIVERED_BYTES", 200)
    spool = Spool(tmp_path / "a", {"experiment": "a"})
    seen = []
    for number in range(100):
        spool.append({"do": "tags", "run": str(number)})
        if number % 3 == 2:
            for position, operation in spool.pending():
                seen.append(operation["run"])
                spool.delivered(position, operation)
            assert spool.is_empty()
    assert (tmp_path / "a" / "operations.jsonl").stat().st_size < 400
    spool.close()
    again = Spool(tmp_path / "a")
    seen += [operation["run"] for _, operation in again.pending()]
    assert seen == [str(number) for number in range(100)]


def test_a_second_sweep_of_the_same_name_is_refused(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    recorder = Recorder("twice", uri, spool_folder=tmp_path / "spool")
    recorder.start_sweep("mine", {}, {})
    recorder.end_sweep("FINISHED")
    with pytest.raises(ValueError, match="has a sweep 'mine' already; allowed: --resume"):
        Recorder("twice", uri, spool_folder=tmp_path / "spool").start_sweep("mine", {}, {})


@pytest.mark.skipif(not can_mount(), reason="no right to mount: the disk that gets full must be a small one")
def test_a_full_disk_delays_the_record_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "1m"):
        spool = Spool(disk / "a", {"experiment": "a"})
        spool.append({"do": "tags", "run": "0"})
        room = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(bytes(room))
        for number in range(1, 400):
            spool.append({"do": "tags", "run": str(number), "tags": {"x": "y" * 100}})
        assert not spool.write_out()
        assert not spool.is_empty()
        on_disk = [operation["run"] for _, operation in spool.pending()]
        assert on_disk == [str(number) for number in range(len(on_disk))]
        assert len(on_disk) < 400
        (disk / "ballast").unlink()
        assert spool.write_out()
        assert [operation["run"] for _, operation in spool.pending()] == [str(number) for number in range(400)]
        spool.close()


def test_a_new_sweep_never_gets_a_spooled_sweeps_name(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    head = {"tracking_uri": uri, "experiment": "names", "sweep": "names-1"}
    spool = Spool(tmp_path / "spool" / "names-1", head)
    spool.append({"do": "start", "run": "", "name": "names-1", "time": 1, "parameters": {}, "tags": {}})
    spool.close()
    recorder = Recorder("names", uri, spool_folder=tmp_path / "spool")
    assert recorder.next_sweep_name() == "names-2"
    with pytest.raises(ValueError, match=r"the record of a sweep 'names-1' waits .* `loragrid sync`"):
        recorder.start_sweep("names-1", {}, {})


def test_a_number_in_a_users_sweep_name_is_skipped(tmp_path: Path) -> None:
    recorder = Recorder("names", default_tracking_uri(str(tmp_path / "store"), None))
    recorder.start_sweep("names-2", {}, {})
    recorder.end_sweep("FINISHED")
    assert recorder.next_sweep_name() == "names-3"


def test_undeliverable_operations_stay_spooled_without_blocking_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loragrid.tracking.recorder, "PATIENCE_SECONDS", 1.0)
    recorder = Recorder("full", default_tracking_uri(str(tmp_path / "store"), None), spool_folder=tmp_path / "spool")
    recorder.start_sweep("full-1", {}, {})
    recorder.start_trial("lora-1", {}, {})
    (tmp_path / "spool" / "full-1" / "refused.jsonl").mkdir()  # as unwritable as on a full disk
    recorder.log_records("lora-1", [{"step": 0, "no such name?!": 1.0}])
    recorder.end_sweep("FINISHED")
    assert not recorder.is_delivered


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_closed_terminal_does_not_block_a_sweeps_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loragrid.tracking.delivery, "SECONDS_BEFORE_NOTICE", 0.1)

    def notify(sentence: str) -> None:
        raise BrokenPipeError(sentence)

    uri = default_tracking_uri(str(tmp_path / "store"), None)
    recorder = Recorder("pipe", uri, spool_folder=tmp_path / "spool", notify=notify)
    recorder.start_sweep("pipe-1", {}, {})
    recorder.start_trial("lora-1", {}, {})
    assert recorder.deliver()
    (tmp_path / "store" / "artifacts").write_text("a file where the folder was to be")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "file.txt").touch()
    recorder.log_artifacts("lora-1", tmp_path / "adapter", "adapter")
    recorder.end_sweep("FINISHED")
    assert not recorder.is_delivered


def test_another_experiments_running_sweep_does_not_block_sync(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    Recorder("mine", uri)
    waiting = Spool(tmp_path / "spool" / "mine-1", {"tracking_uri": uri, "experiment": "mine", "sweep": "mine-1"})
    waiting.append({"do": "start", "run": "", "name": "mine-1", "time": 1, "parameters": {}, "tags": {}})
    waiting.close()
    running = Spool(tmp_path / "spool" / "another-1", {"tracking_uri": uri, "experiment": "another", "sweep": "a"})
    assert sync(tmp_path / "spool", "mine") == {"mine-1": 1}
    running.close()


def test_what_is_no_answer_of_mlflow_is_a_sentence_too(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path / "store"), None)
    Recorder("mine", uri)
    (tmp_path / "store" / "artifacts").write_text("a file where the folder was to be")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "file.txt").touch()
    spool = Spool(tmp_path / "spool" / "mine-1", {"tracking_uri": uri, "experiment": "mine", "sweep": "mine-1"})
    spool.append({"do": "start", "run": "", "name": "mine-1", "time": 1, "parameters": {}, "tags": {KIND_TAG: "sweep"}})
    spool.append({"do": "artifacts", "run": "", "files": spool.keep_files(tmp_path / "adapter"), "path": ""})
    spool.close()
    with pytest.raises(ValueError, match=r"did not accept the record of mine-1: .*Not a directory.* it is kept in"):
        sync(tmp_path / "spool")
    (tmp_path / "spool" / "mine-1" / "spool.json").write_text("")
    with pytest.raises(ValueError, match=r"spool\.json: is not a spool file that LoraGrid wrote"):
        sync(tmp_path / "spool")


def test_sync_fails_fast_if_the_server_is_away(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a", {"experiment": "a", "sweep": "a-1", "tracking_uri": "http://127.0.0.1:9"})
    spool.append({"do": "reopen", "run": ""})
    spool.close()
    code = f"from pathlib import Path; from loragrid.tracking.sync import sync; sync(Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment = {key: value for key, value in environment.items() if not key.startswith("MLFLOW_HTTP")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "http://127.0.0.1:9 did not accept the record of a-1" in done.stderr


def test_new_spool_files_never_replace_pending_ones(tmp_path: Path, artifact: Path) -> None:
    spool = Spool(tmp_path / "a", {"experiment": "a"})
    names = [spool.keep_files(artifact) for _ in range(2)]
    for name in names:
        spool.append({"do": "artifacts", "run": "", "files": name, "path": ""})
    spool.delivered(*next(spool.pending()))
    spool.close()
    assert Spool(tmp_path / "a").keep_files(artifact) not in names


@pytest.mark.heavy
def test_earlier_failures_do_not_shorten_the_final_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loragrid.tracking.recorder, "PATIENCE_SECONDS", 5.0)
    recorder = Recorder("long", default_tracking_uri(str(tmp_path / "store"), None), spool_folder=tmp_path / "spool")
    recorder.start_sweep("long-1", {}, {})
    recorder.start_trial("lora-1", {}, {})
    assert recorder.deliver()
    in_the_way = tmp_path / "store" / "artifacts"
    in_the_way.touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "file.txt").touch()
    recorder.log_artifacts("lora-1", tmp_path / "adapter", "adapter")
    time.sleep(6)
    threading.Timer(1.0, in_the_way.unlink).start()
    recorder.end_sweep("FINISHED")
    assert recorder.is_delivered
