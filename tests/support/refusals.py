"""The checks that every refusal of the command line must pass."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
import ray

from loragrid.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
MAX_MESSAGE_CHARACTERS = 20_000


class Write(Protocol):
    """Writes the file of an experiment that is valid except for one key."""

    def __call__(self, key: str, value: object) -> Path: ...


class Refuses(Protocol):
    """Runs an experiment file that must be refused, and returns the message, which must contain the `parts`.

    It checks that nothing starts, and that nothing is written outside `may_write`.
    """

    def __call__(self, file: Path, *parts: str, may_write: Path | None = None) -> str: ...


def make_refuses(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuses:
    """Returns a `Refuses` that runs `loragrid run FILE` in this process, with home and working folder below `place`."""
    for folder in ("work", "home"):
        (place / folder).mkdir()
    monkeypatch.chdir(place / "work")
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def no_ray(**_: object) -> None:
        raise AssertionError("Ray was about to be started")

    monkeypatch.setattr(ray, "init", no_ray)

    def run(file: Path, *parts: str, may_write: Path | None = None) -> str:
        monkeypatch.setattr("sys.argv", ["loragrid", "run", str(file)])
        before, children = everything_in(place), psutil.Process().children()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        message = capsys.readouterr().err
        check_message(ended.value.code, message, *parts)
        written = {path for path, _ in everything_in(place).items() ^ before.items()}
        assert {path for path in written if may_write is None or not path.is_relative_to(may_write)} == set()
        assert psutil.Process().children() == children
        assert not ray.is_initialized()
        return message

    return run


def refuses_in_a_process(place: Path, file: Path, *parts: str) -> None:
    """Checks a refusal in a separate process, as a user runs it; nothing may be written below `place`."""
    (place / "home").mkdir()
    before = everything_in(place)
    path = os.pathsep.join(str(ROOT / source_root) for source_root in ("platform", "methods"))
    done = subprocess.run(
        [sys.executable, "-m", "loragrid", "run", str(file)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path, "HOME": str(place / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    check_message(done.returncode, done.stderr, *parts)
    assert done.stdout == ""
    assert everything_in(place) == before


def check_message(code: object, message: str, *parts: str) -> None:
    """Asserts exit code 2 and a short, printable error message with all `parts` and without a traceback."""
    assert code == 2, message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert message.replace("\n", "").isprintable()
    assert len(message) < MAX_MESSAGE_CHARACTERS
    for part in parts:
        assert part in message, message


def everything_in(folder: Path) -> dict[Path, tuple[int, int]]:
    """Path -> (size, time of the last change), for everything below a folder."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def changed(mapping: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """A copy of an experiment with one key set; `methods.0.` is the first method, the text after `grid.` one axis."""
    whole = copy.deepcopy(mapping)
    node: Any = whole
    head, _, rest = key.partition(".")
    while rest:
        node = node[int(head)] if isinstance(node, list) else node.setdefault(head, {})
        head, _, rest = (rest, "", "") if head == "grid" else rest.partition(".")
    node[head] = value
    return whole
