"""Measures the load of the machine's CPUs, to tell whether a time was measured undisturbed."""

import os
import time
from types import TracebackType

import psutil
import torch

SHORTEST_SECONDS = 0.5
"""Shorter measurements have no load: the system counts CPU time in ticks of 10 ms per core."""


class CpuLoad:
    """A context that measures the CPUs that this process wants and others take, relative to those it may use.

    `value` afterwards: (num_threads + cores that other processes kept busy) / cores that this process may use. Above 1
    the process had to wait for a core. None if the context was left too soon, or the system does not count CPU time.
    Containers with a quota see the load of the whole machine.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self.value: float | None = None

    def __enter__(self) -> "CpuLoad":
        self._start = _read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (wall, own, busy), (wall_before, own_before, busy_before) = _read(), self._start
        self.value = load_of(self._num_threads, num_cores(), wall - wall_before, own - own_before, busy - busy_before)


def load_of(num_threads: int, num_cores: int, wall: float, own: float, busy: float) -> float | None:
    """The load over `wall` seconds in which the cores were busy for `busy` seconds, `own` of them for this process."""
    if wall < SHORTEST_SECONDS or busy <= 0.0:
        return None
    others = max(0.0, busy - own) / wall
    return (num_threads + others) / num_cores


def worker_threads(device: torch.device) -> int:
    """The threads of this process that compute: on a GPU the one that launches kernels."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def num_cores() -> int:
    """The cores that this process may use."""
    return len(_usable())


def _usable() -> set[int]:
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return set(affinity(0)) if affinity else set(range(os.cpu_count() or 1))


def _read() -> tuple[float, float, float]:
    """(Wall-clock seconds, CPU seconds of this process, seconds for which the usable cores were busy)."""
    cores = psutil.cpu_times(percpu=True)
    usable = [core for number, core in enumerate(cores) if number in _usable()]
    # `steal` is the time that a virtual machine's host gave to others; `guest` is part of `user`.
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    busy = sum(getattr(core, kind, 0.0) for core in usable for kind in kinds)
    return time.monotonic(), time.process_time(), busy
