"""Turns SIGINT and SIGTERM into an orderly end of Tune."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from loragrid.sweep.ray_internals import STOP_TUNE
from loragrid.sweep.ray_processes import is_ending

# A second SIGTERM within this time is the same request, sent to the process's group as well.
SAME_REQUEST_SECONDS = 1.0


class SweepInterrupted(KeyboardInterrupt):
    """The user, or the machine, has ended a sweep; its record is complete up to there."""

    def __init__(self, sweep: str, signal_number: int) -> None:
        super().__init__(f"{sweep} was interrupted")
        self.sweep, self.signal = sweep, signal_number


@contextmanager
def ended_by_signals(own_ray: Sequence[psutil.Process] = ()) -> Iterator[list[int]]:
    """Within, the first SIGINT or SIGTERM lets Tune end in good order, and a later one ends it at once.

    Yields the list of the signals that have come. Does nothing outside the main thread: no other can handle signals.

    `timeout`, Slurm and systemd send SIGTERM to a whole group of processes, and so to the Ray that was started for this
    sweep. Without that Ray, Tune would wait for a minute and then be ended by Ray, so it is ended at once. `own_ray`,
    the processes of that Ray, show this by their end. (Ray's processes ignore SIGINT.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    handler = _Handler(own_ray)
    # `STOP_TUNE` is handled first and restored last: by default it would kill the process.
    handlers = {STOP_TUNE: handler.stop_before_tune, signal.SIGINT: handler.stop, signal.SIGTERM: handler.stop}
    before = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        yield handler.received
    finally:
        for number in reversed(handlers):
            signal.signal(number, before[number])


class _Handler:
    """What a sweep does when a signal comes."""

    def __init__(self, own_ray: Sequence[psutil.Process]) -> None:
        self.received: list[int] = []
        self._own_ray = own_ray
        self._first_time = 0.0

    def stop(self, number: int, frame: object) -> None:
        """Ask Tune to stop; raise KeyboardInterrupt if it was asked before, or if its Ray is ending too."""
        if self.received:
            # `timeout` sends SIGTERM to the process and to its group.
            is_new = time.monotonic() - self._first_time >= SAME_REQUEST_SECONDS
            if number == self.received[0] == signal.SIGTERM and not is_new:
                return
            raise KeyboardInterrupt
        self._first_time = time.monotonic()
        self.received.append(number)
        if number == signal.SIGTERM and is_ending(self._own_ray):
            raise KeyboardInterrupt
        signal.raise_signal(STOP_TUNE)

    def stop_before_tune(self, number: int, frame: object) -> None:
        """Tune has not installed its own handler yet."""
        raise KeyboardInterrupt
