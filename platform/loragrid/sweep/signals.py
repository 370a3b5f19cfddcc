"""Turns SIGINT and SIGTERM into an orderly end of Tune."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from loragrid.sweep.ray_processes import is_ending

# A second SIGTERM within so long is the first one, sent to the process's group as well.
SAME_WISH_SECONDS = 1.0


class SweepInterrupted(KeyboardInterrupt):
    """The user, or the machine, has ended a sweep; its record is complete up to there."""

    def __init__(self, sweep: str, signal_number: int) -> None:
        super().__init__(f"{sweep} was interrupted")
        self.sweep, self.signal = sweep, signal_number


@contextmanager
def ended_by_signals(own_ray: Sequence[psutil.Process] = ()) -> Iterator[list[int]]:
    """Within, SIGINT and SIGTERM let Tune end in good order; gives those that came. A later one ends it at once.

    Tune stops at SIGUSR1. Its own handler of SIGINT does not say afterwards that it was called, and Ray's of SIGTERM
    prints a stack of C++. Only a main thread can handle signals.

    `timeout`, Slurm and systemd send SIGTERM to a whole group of processes, and so to the Ray that was started for this
    sweep: without it Tune would wait for a minute, and then be ended by Ray. (SIGINT is nothing to Ray's processes.)
    `own_ray` tells by its end that this is so. `timeout` sends it to the process and to its group, which is one wish.
    """
    came: list[int] = []
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def stop(number: int, frame: object) -> None:
        nonlocal first
        if came:
            if number == came[0] == signal.SIGTERM and time.monotonic() - first < SAME_WISH_SECONDS:
                return
            raise KeyboardInterrupt
        first = time.monotonic()
        came.append(number)
        if number == signal.SIGTERM and is_ending(own_ray):
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGUSR1)

    def stop_at_once(number: int, frame: object) -> None:
        raise KeyboardInterrupt  # Tune is not there yet

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in handled}
    signal.signal(signal.SIGUSR1, stop_at_once)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
