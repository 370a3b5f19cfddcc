"""Delivers a spool to MLflow in the background, in order, however often the store fails in between."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loragrid.spool import Operation, Spool
from loragrid.store_writer import StoreWriter, will_never_be_taken

SECONDS_BETWEEN_TRIES = (0.5, 1.0, 2.0, 5.0)
SECONDS_BEFORE_TROUBLE_IS_TOLD = 5.0


class Delivery:
    """A thread that hands `spool` to `writer`; `notify` is told, in a sentence, when the store fails and comes back."""

    def __init__(self, spool: Spool, writer: StoreWriter, notify: Callable[[str], None]) -> None:
        self._spool, self._writer, self._notify = spool, writer, notify
        self._wake, self._stop = threading.Event(), threading.Event()
        self._failing_since: float | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name="loragrid-delivery", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something new in the spool."""
        self._wake.set()

    def wait(self, patience_seconds: float) -> bool:
        """Wait until all is delivered; False once the store, or the disk, has failed for `patience_seconds` of it."""
        start = time.monotonic()
        full_since: float | None = None
        while not self._spool.is_empty():
            if not self._thread.is_alive():  # what it could not bear, Python has printed
                return False
            full_since = None if self._spool.write_out() else full_since or time.monotonic()
            self.wake()
            failing = self._failing_since or full_since
            if failing is not None and time.monotonic() - max(failing, start) > patience_seconds:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Stop after the operation at hand; the rest stays in the spool."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        with _mlflows_own_complaints_kept_back():
            while not self._stop.is_set():
                self._wake.clear()
                for position, operation in self._spool.pending():
                    if not self._deliver(operation):
                        return
                    self._spool.delivered(position, operation)
                self._wake.wait()

    def _deliver(self, operation: Operation) -> bool:
        """Try until the store has taken the operation, or never will; False when told to stop."""
        tries = 0
        while not self._stop.is_set():
            error = deliver(operation, self._spool, self._writer)
            if error is None:
                self._well_again()
                return True
            self._in_trouble(error)
            self._stop.wait(SECONDS_BETWEEN_TRIES[min(tries, len(SECONDS_BETWEEN_TRIES) - 1)])
            tries += 1
        return False

    def _in_trouble(self, error: Exception) -> None:
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        elif not self._told and now - self._failing_since > SECONDS_BEFORE_TROUBLE_IS_TOLD:
            self._told = True
            self._notify(f"MLflow does not answer ({_first_line(error)}); training goes on, its record is kept on disk")

    def _well_again(self) -> None:
        if self._told:
            self._notify("MLflow answers again")
        self._failing_since, self._told = None, False


def deliver(operation: Operation, spool: Spool, writer: StoreWriter) -> Exception | None:
    """Hand one operation over; what the store will never take is put aside. Gives what may be over in a while."""
    try:
        writer.write(operation, spool.files(operation["files"]) if "files" in operation else None)
    except Exception as error:
        if not will_never_be_taken(error):
            return error
        try:
            spool.refuse(operation, _first_line(error))
        except OSError as full:  # it can neither be taken nor put aside: it stays where it is
            return full
    return None


def deliver_all(spool: Spool, writer: StoreWriter) -> int:
    """Hand everything over, now; gives how many operations that were. Raises what the store raises."""
    number = 0
    with _mlflows_own_complaints_kept_back():
        for position, operation in spool.pending():
            error = deliver(operation, spool, writer)
            if error is not None:
                raise error
            spool.delivered(position, operation)
            number += 1
    return number


@contextmanager
def _mlflows_own_complaints_kept_back() -> Iterator[None]:
    """Within, MLflow does not print what it raises anyway."""
    logger = logging.getLogger("mlflow.store.db.utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
