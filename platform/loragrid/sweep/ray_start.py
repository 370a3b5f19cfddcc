"""Starts Ray, or connects to a cluster; a failure ends in one sentence that says what was tried and how to mend it."""

import contextlib
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import sleep as _pause

import psutil
import ray

from loragrid.config.local_path import reason_of
from loragrid.sweep.ray_internals import ASK_HEAD
from loragrid.sweep.ray_processes import own_ray_processes

LOCAL = "local"
CONNECT_SECONDS = 10.0
HEAD_ANSWERS_SECONDS = 60.0
RETRY_SECONDS = 2.0
MAX_PORT = 65535

_HOST_AND_PORT = re.compile(r"(?:ray://)?(?P<host>[^:/]+):(?P<port>\d{1,5})")
_LOG_LINE = re.compile(r"^\[[^\]]*\] |^\S*(?:Error|Exception): ")

# Ray's words -> what to do.
_REMEDIES = {
    "AF_UNIX path length": "set RAY_TMPDIR to a folder with a short path, such as /tmp",
    "Not a directory|No such file or directory|Permission denied|Read-only|No space left": (
        "set RAY_TMPDIR to an existing folder that can be written and has room"
    ),
    "https?://": "give the address of the cluster's head, such as HEAD:6379; an address http://HEAD:8265 is for "
    "`ray job submit --address`",
    "[Vv]ersion mismatch": "install the cluster's versions of Ray and Python here",
    "[Uu]nauthenticated|[Aa]uth(?:entication|orization)|token": "set RAY_AUTH_MODE and RAY_AUTH_TOKEN as on the head",
    "shm|object store": "make /dev/shm larger (in Docker: --shm-size)",
    "Could not find any running Ray": "start a cluster (ray start --head), or leave the address out to start one for "
    "this run",
    "Too many open files": "raise the limit of open files (ulimit -n 65536)",
    "Resource temporarily unavailable|can't start new thread": "raise the limit of processes (ulimit -u)",
}


class RayStartError(RuntimeError):
    """Ray could not be started, or its cluster could not be reached: the experiment is right, its environment is not.

    Its text is one sentence. Nothing has been trained, and no process is left.
    """


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to be reached. address: `local`, or a cluster's. origin: what decided it, such as `--address HOST:1`."""

    address: str
    origin: str

    @property
    def is_local(self) -> bool:
        """Whether Ray is started on this machine for this sweep only."""
        return self.address == LOCAL


class _HopelessError(Exception):
    """A failure that another attempt would repeat."""


def goal_of(address: str | None) -> Goal:
    """What `--address`, or else `RAY_ADDRESS`, asks for; without both, a Ray of its own.

    Raises:
        ValueError: the address is empty, as from a variable that is not set.
    """
    if address is not None and not address.strip():
        raise ValueError("--address is empty; allowed: auto, HOST:PORT, or no --address to start Ray for this run")
    if address is not None:
        return Goal(address=address, origin=f"--address {address}")
    found = os.environ.get("RAY_ADDRESS")
    return Goal(address=found, origin=f"RAY_ADDRESS={found}") if found else Goal(address=LOCAL, origin="no --address")


def start_ray(goal: Goal) -> None:
    """Connect this process to Ray. A failed attempt is repeated once, because machines are sometimes just busy.

    Raises:
        RayStartError: Ray cannot be started or reached; what the attempts started has been ended.
    """
    before = set(own_ray_processes())
    failure: Exception | None = None
    attempts = 0
    while attempts < 2:
        attempts += 1
        try:
            if not goal.is_local:
                _check_answers(goal.address)
            with _quiet(_sentence(goal, "this program ended while Ray was starting", 1)):
                ray.init(address=goal.address, log_to_driver=False, logging_level=logging.ERROR)
            return
        except Exception as error:  # Ray raises built-in exceptions of many kinds, and plain `Exception`
            failure = error
            with contextlib.suppress(Exception):
                ray.shutdown()
            _end(before)
            if isinstance(error, ValueError | _HopelessError):  # a malformed address
                break
        if attempts < 2:
            _pause(RETRY_SECONDS)
    assert failure is not None
    raise RayStartError(_sentence(goal, reason_of(failure), attempts)) from failure


def _sentence(goal: Goal, reason: str, attempts: int) -> str:
    tried = ", tried twice" if attempts == 2 else ""
    remedy = next((text for words, text in _REMEDIES.items() if re.search(words, reason)), None)
    if goal.is_local:
        what = f"Ray could not be started on this machine ({goal.origin}{tried})"
        remedy = remedy or f"look into Ray's logs in {_log_folder()}, or try `ray start --head` alone"
    else:
        what = f"no Ray cluster could be reached ({goal.origin}{tried})"
        leave_out = "unset RAY_ADDRESS" if goal.origin.startswith("RAY_ADDRESS") else "leave --address out"
        remedy = remedy or f"start the cluster, correct the address, or {leave_out} to start Ray for this run"
    return f"{what}: {reason.rstrip('.')}; to mend it: {remedy}"


def _log_folder() -> Path:
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    return folder / "session_latest" / "logs"


def _check_answers(address: str) -> None:
    """Ask the address within seconds; Ray itself tries for ten minutes, and then ends the process.

    Raises:
        OSError: nothing listens there.
        _HopelessError: what listens there is not the head of a cluster.
    """
    found = _HOST_AND_PORT.fullmatch(address)
    if found:
        if int(found["port"]) > MAX_PORT:
            raise _HopelessError(f"a port is at most {MAX_PORT}")
        socket.create_connection((found["host"], int(found["port"])), timeout=CONNECT_SECONDS).close()
    if address.startswith("ray://"):
        return
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK_HEAD, address], capture_output=True, text=True, timeout=HEAD_ANSWERS_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        what = f"what listens there has not answered as a cluster's head within {HEAD_ANSWERS_SECONDS:g} s"
        raise _HopelessError(what) from error
    if asked.returncode:
        lines = [line for line in (asked.stdout.strip() or asked.stderr.strip()).splitlines() if line.strip()]
        raise _HopelessError(_LOG_LINE.sub("", lines[-1]) if lines else f"asking it ended with {asked.returncode}")


def _end(before: set[psutil.Process]) -> None:
    """End the Ray processes that this process has started since."""
    for process in own_ray_processes():
        if process not in before:
            with contextlib.suppress(Exception):
                for child in process.children(recursive=True):
                    child.kill()
            with contextlib.suppress(Exception):
                process.kill()
                process.wait(10)


@contextlib.contextmanager
def _quiet(last_words: str) -> Iterator[None]:
    """Keep Ray's output while it starts: pages of its logs and its tracebacks would bury the one sentence.

    last_words: what is printed, with the end of that output, if the whole process ends. C++ code of Ray ends it
    after some failures, and no exception can be caught then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.NamedTemporaryFile(prefix="loragrid-ray-") as output:
        # The shell waits for a line. If this process dies, the line never comes, and it prints instead.
        script = f"read -r started || {{ tail -n 5 {shlex.quote(output.name)}; echo {shlex.quote(last_words)}; }} >&2"
        witness = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        kept = [os.dup(1), os.dup(2)]
        try:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            witness.communicate(b"started\n")
