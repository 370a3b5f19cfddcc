"""A signal that ends a sweep and the Ray it started is distinguished from one that ends only the sweep."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from loragrid.sweep.ray_processes import is_ending, own_ray_processes
from loragrid.sweep.signals import ended_by_signals

SLEEPS = (sys.executable, "-c", "import time; time.sleep(60)")


@pytest.fixture
def children() -> "Iterator[list[subprocess.Popen[bytes]]]":
    """Two processes of this one: the first has Ray's package in its command, the second a home that is called so."""
    inside = Path(ray.__file__).parent / "core" / "gcs_server"
    started = [subprocess.Popen([*SLEEPS, str(inside)]), subprocess.Popen([*SLEEPS, "/home/ray/lib/x"])]
    yield started
    for process in started:
        process.kill()
        process.wait()


def ours(children: "list[subprocess.Popen[bytes]]") -> list[int]:
    pids = {child.pid for child in children}
    return [process.pid for process in own_ray_processes() if process.pid in pids]


def test_processes_of_rays_that_this_process_started_are_found(
    children: "list[subprocess.Popen[bytes]]",
) -> None:
    assert ours(children) == [children[0].pid]
    children[0].kill()
    os.waitid(os.P_PID, children[0].pid, os.WEXITED | os.WNOWAIT)  # it has ended, and remains a child
    assert ours(children) == [], "the command of an ended process cannot be read"


def test_one_that_has_ended_ends_all_and_nothing_else_does(children: "list[subprocess.Popen[bytes]]") -> None:
    processes = [psutil.Process(child.pid) for child in children]
    assert not is_ending([])
    assert not is_ending(processes)
    children[1].terminate()
    assert is_ending(processes)
    children[1].wait()
    assert is_ending(processes), "no process has its id now"


@pytest.mark.parametrize(("signal_number", "is_group"), [(signal.SIGTERM, True), (signal.SIGTERM, False), (2, True)])
def test_a_group_that_is_ended_is_not_waited_for(
    children: "list[subprocess.Popen[bytes]]", signal_number: int, is_group: bool
) -> None:
    stopped = []
    with ended_by_signals([psutil.Process(children[0].pid)]) as came:
        signal.signal(signal.SIGUSR1, lambda number, frame: stopped.append(number))  # as Tune does
        if is_group:
            children[0].terminate()
        if is_group and signal_number == signal.SIGTERM:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal_number)
            signal.raise_signal(signal_number)  # to the group, then to the process: one request
        else:
            signal.raise_signal(signal_number)
    assert came == [signal_number]
    assert stopped == ([] if is_group and signal_number == signal.SIGTERM else [signal.SIGUSR1])
