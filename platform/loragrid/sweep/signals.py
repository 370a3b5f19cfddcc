"""Turns SIGINT and SIGTERM into an orderly end of Tune."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from loragrid.sweep.ray_internals import STOP_TUNE
from loragrid.sweep.ray_processes import is_ending

# A second SIGTERM within this time belongs to the same request: it was sent to the process and to its group.
SAME_REQUEST_SECONDS = 1.0


class SweepInterrupted(KeyboardInterrupt):
    """A signal from the user or the machine ended the sweep; its record is complete up to that point."""

    def __init__(self, sweep: str, signal_number: int) -> None:
        super().__init__(f"{sweep} was interrupted")
        self.sweep, self.signal = sweep, signal_number


@contextmanager
def ended_by_signals(own_ray: Sequence[psutil.Process] = ()) -> Iterator[list[int]]:
    """Inside the `with` block, the first SIGINT or SIGTERM ends Tune in good order; a later one ends it at once.

    Yields the list of received signals. Does nothing outside the main thread, because only that can handle signals.

    own_ray: the processes of the Ray that was started for this sweep. `timeout`, Slurm and systemd send SIGTERM to the
    whole process group, which includes that Ray. Without its Ray, Tune would wait for a minute until Ray ended it.
    Tune is therefore ended at once if one of these processes ends after the SIGTERM. (Ray's processes ignore SIGINT.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    handler = _Handler(own_ray)
    # The handler of `STOP_TUNE` is installed first and removed last, because by default the signal kills the process.
    handlers = {STOP_TUNE: handler.stop_before_tune, signal.SIGINT: handler.stop, signal.SIGTERM: handler.stop}
    before = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        yield handler.received
    finally:
        for number in reversed(handlers):
            signal.signal(number, before[number])


@contextmanager
def stop_handler_kept() -> Iterator[None]:
    """After the `with` block, `STOP_TUNE` has the handler that it had before; Tune leaves its own behind.

    A signal between two runs of Tune would otherwise be noticed only by the second run.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(STOP_TUNE)
    try:
        yield
    finally:
        if is_main:  # only the main thread can set handlers, so Tune has set none in another
            signal.signal(STOP_TUNE, before)


class _Handler:
    """The signal handlers of a sweep."""

    def __init__(self, own_ray: Sequence[psutil.Process]) -> None:
        self.received: list[int] = []
        self._own_ray = own_ray
        self._first_time = 0.0

    def stop(self, number: int, frame: object) -> None:
        """Tell Tune to stop; raise KeyboardInterrupt if that was done before, or if Tune's Ray is ending too."""
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
        """Handle `STOP_TUNE` while Tune has not installed its own handler yet."""
        raise KeyboardInterrupt
