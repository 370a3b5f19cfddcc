"""The Ray that a sweep has started for itself: who ends a whole group of processes ends it together with the sweep."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import ray

POLL_SECONDS = 0.05
# So long after a group of processes was sent SIGTERM the first of Ray's, Python programs without a handler, are gone.
GROUP_ENDS_SECONDS = 2.0


def own_ray_processes() -> list[psutil.Process]:
    """Those of Ray's processes that this process has started; none of a cluster that was there before."""
    package = f"{Path(ray.__file__).parent}{os.sep}"
    found = []
    for child in psutil.Process().children():
        try:
            if any(word.startswith(package) for word in child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has just ended, or is somebody else's
            continue
    return found


def is_ending(processes: Sequence[psutil.Process]) -> bool:
    """Whether one of the processes has ended, or does so within two seconds."""
    deadline = time.monotonic() + GROUP_ENDS_SECONDS
    while processes:
        if not all(_is_alive(process) for process in processes):
            return True
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_SECONDS)
    return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it cannot be asked: nothing says that it has ended
        return True
