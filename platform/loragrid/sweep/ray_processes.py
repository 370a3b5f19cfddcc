"""Finds the Ray processes that a sweep started for itself, and whether a signal to its process group is ending them."""

import time
from collections.abc import Sequence

import psutil

from loragrid.sweep.ray_internals import is_ray_command

POLL_SECONDS = 0.05
# After a SIGTERM to a process group, the first Ray processes (Python programs without a handler) end within this time.
GROUP_ENDS_SECONDS = 2.0


def own_ray_processes() -> list[psutil.Process]:
    """The Ray processes that this process has started; empty if it uses a cluster that was already running."""
    found = []
    for child in psutil.Process().children():
        try:
            if is_ray_command(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it has just ended, or it belongs to another user
            continue
    return found


def is_ending(processes: Sequence[psutil.Process]) -> bool:
    """Whether one of the processes has ended, or ends within two seconds."""
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
    except psutil.Error:  # its state cannot be read, so nothing shows that it has ended
        return True
