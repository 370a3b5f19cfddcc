"""Ray that cannot start or be reached: one sentence with what was tried and a remedy, and no process is left."""

import http.server
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from loragrid.sweep import ray_start
from loragrid.sweep.cluster import connected_to_ray
from loragrid.sweep.ray_processes import own_ray_processes
from loragrid.sweep.ray_start import RayStartError, goal_of
from tests.support.shared_ray import SharedRay


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, shared_ray: SharedRay) -> None:
    """No Ray runs in this process (tests before these may have left the shared one), and no address is set."""
    shared_ray.stop()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_start, "RETRY_SECONDS", 0.0)


@pytest.fixture
def web_server() -> Iterator[str]:
    """The address of a server that is no head of a Ray cluster."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def refusal(address: str | None, capfd: pytest.CaptureFixture[str]) -> str:
    """The one sentence of the failure; nothing else is printed, and no process is left."""
    children = psutil.Process().children()
    with pytest.raises(RayStartError) as failed, connected_to_ray(address):
        pass
    assert not ray.is_initialized()
    assert psutil.Process().children() == children
    assert capfd.readouterr() == ("", "")
    sentence = str(failed.value)
    assert "\n" not in sentence
    assert "; to mend it: " in sentence
    return sentence


@pytest.mark.parametrize(
    ("folder", "reason", "remedy"),
    [
        ("file", "Not a directory", "set RAY_TMPDIR to an existing folder"),
        ("x" * 100, "AF_UNIX path length cannot exceed 107 bytes", "set RAY_TMPDIR to a folder with a short path"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    folder: str,
    reason: str,
    remedy: str,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / folder))
    sentence = refusal(None, capfd)
    assert sentence.startswith("Ray could not be started on this machine (no --address, tried twice): ")
    assert reason in sentence
    assert remedy in sentence


@pytest.mark.parametrize(
    ("address", "reason", "remedy"),
    [
        ("127.0.0.1:1", "Connection refused", "start the cluster, correct the address, or leave --address out"),
        ("ray://127.0.0.1:1", "Connection refused", "start the cluster"),
        ("127.0.0.1:99999", "a port is at most 65535", "correct the address"),
        ("no-such-host.invalid:6379", "no-such-host", "correct the address"),
    ],
)
def test_an_address_that_does_not_answer_is_named(
    capfd: pytest.CaptureFixture[str], address: str, reason: str, remedy: str
) -> None:
    sentence = refusal(address, capfd)
    assert sentence.startswith(f"no Ray cluster could be reached (--address {address}")
    assert reason in sentence or "not known" in sentence or "resolution" in sentence
    assert remedy in sentence


@pytest.mark.heavy  # each asks in a process of its own, which imports Ray
@pytest.mark.parametrize(
    ("address", "reason", "remedy"),
    [
        ("nonsense", "Invalid address format: nonsense", "correct the address"),
        ("None", "Invalid address format: None", "correct the address"),
        ("nonsense:port", "Invalid gcs_address: nonsense:port", "correct the address"),
        (
            "http://127.0.0.1:8265",
            "Invalid address format",
            "give the address of the cluster's head, such as HEAD:6379",
        ),
    ],
)
def test_an_address_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], address: str, reason: str, remedy: str
) -> None:
    sentence = refusal(address, capfd)
    assert sentence.startswith(f"no Ray cluster could be reached (--address {address}): ")
    assert reason in sentence
    assert remedy in sentence


@pytest.mark.heavy
def test_a_server_that_is_no_head_is_given_up_in_seconds(
    web_server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_start, "HEAD_ANSWERS_SECONDS", 4.0)
    monkeypatch.setenv("RAY_ADDRESS", web_server)
    sentence = refusal(None, capfd)
    assert sentence.startswith(f"no Ray cluster could be reached (RAY_ADDRESS={web_server}): ")
    assert "has not answered as a cluster's head within 4 s" in sentence
    assert "unset RAY_ADDRESS to start Ray for this run" in sentence


def test_what_is_tried_is_named_by_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert goal_of(None).is_local
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert goal_of(None).is_local
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert goal_of(None).origin == "RAY_ADDRESS=head:6379"
    assert goal_of("local").is_local
    assert goal_of("other:6379").origin == "--address other:6379"
    for empty in ("", " "):  # as from --address "$HEAD" without the variable
        with pytest.raises(ValueError, match="--address is empty; allowed: auto, HOST:PORT"):
            goal_of(empty)


@pytest.mark.end_to_end
def test_a_second_attempt_starts_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def repair(_: float) -> None:
        place.unlink()
        place.mkdir()

    monkeypatch.setattr(ray_start, "_pause", repair)
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is too long for Ray's sockets
        place = Path(folder) / "r"
        place.touch()
        monkeypatch.setenv("RAY_TMPDIR", str(place))
        with connected_to_ray(None) as is_local:
            assert is_local
            assert own_ray_processes()
    assert not [process for process in own_ray_processes() if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.heavy
def test_a_ray_that_ends_the_process_is_not_silent() -> None:
    program = (
        "import os, ray\n"
        "from loragrid.sweep.ray_start import goal_of, start_ray\n"
        "ray.init = lambda **_: (os.write(2, b'one line of C++\\n'), os._exit(7))\n"
        "start_ray(goal_of(None))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7
    first, last = done.stderr.strip().splitlines()
    assert first == "one line of C++"
    assert last.startswith("Ray could not be started on this machine (no --address): this program ended while Ray was ")
