"""Delivers a spool to MLflow in the background, each run in its order, however often the store fails in between."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from loragrid.tracking.mlflow_writer import StoreWriter, will_never_be_taken
from loragrid.tracking.spool import Operation, Spool

SECONDS_BETWEEN_TRIES = (0.5, 1.0, 2.0, 5.0)
SECONDS_BEFORE_TROUBLE_IS_TOLD = 5.0
# A store takes ten milliseconds for one call however little is in it, and sixty-four trials of a pack have something
# to say every second: what has come together in between goes as one call for each run.
SECONDS_BETWEEN_DELIVERIES = 2.0
MOST_OPERATIONS_AT_ONCE = 1000

Placed = tuple[int, Operation]
"""An operation of the spool, and the position behind it."""


class Delivery:
    """A thread that hands `spool` to `writer`; `notify` is told, in a sentence, when the store fails and comes back."""

    def __init__(self, spool: Spool, writer: StoreWriter, notify: Callable[[str], None]) -> None:
        self._spool, self._writer, self._notify = spool, writer, notify
        self._wake, self._stop, self._hurry = threading.Event(), threading.Event(), threading.Event()
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
        self._hurry.set()
        try:
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
        finally:
            self._hurry.clear()

    def close(self) -> None:
        """Stop after the call at hand; the rest stays in the spool."""
        self._stop.set()
        self._wake.set()
        self._hurry.set()
        self._thread.join()

    def _run(self) -> None:
        with _mlflows_own_complaints_kept_back():
            while True:
                self._wake.clear()
                if self._stop.is_set():  # looked at after that, or `close` could have woken nobody
                    return
                begun = time.monotonic()
                deliver_pending(self._spool, self._deliver)
                self._wake.wait()
                self._hurry.wait(max(0.0, begun + SECONDS_BETWEEN_DELIVERIES - time.monotonic()))

    def _deliver(self, group: Sequence[Operation]) -> bool:
        """Try until the store has taken the operations, or never will; False when told to stop."""
        tries = 0
        while not self._stop.is_set():
            error = deliver(group, self._spool, self._writer)
            if error is None:
                self._well_again()
                return True
            if is_for_one_of(group, error):
                return all(self._deliver([operation]) for operation in group)
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


def deliver_pending(spool: Spool, take: Callable[[Sequence[Operation]], bool]) -> int:
    """Let `take` have all that waits, in groups that are one call of MLflow; gives how many operations are done.

    Where it gives False, or raises, the rest stays. What was taken behind something that was not comes again, as it
    does after a program that was killed.
    """
    number = 0
    pending = spool.pending()
    while window := list(itertools.islice(pending, MOST_OPERATIONS_AT_ONCE)):
        num_taken = _deliver_window(window, spool, take)
        number += num_taken
        if num_taken < len(window):
            break
    return number


def _deliver_window(window: Sequence[Placed], spool: Spool, take: Callable[[Sequence[Operation]], bool]) -> int:
    taken: set[int] = set()
    number = 0
    for group in grouped(window):
        if not take([operation for _, operation in group]):
            break
        taken.update(position for position, _ in group)
        while number < len(window) and window[number][0] in taken:
            spool.delivered(*window[number])
            number += 1
    return number


def grouped(operations: Sequence[Placed]) -> list[list[Placed]]:
    """Points of a run with nothing else of that run between them are a group, everything else is one by itself.

    What is said of one run stays in its order.
    """
    groups: list[list[Placed]] = []
    latest: dict[str, list[Placed]] = {}
    for placed in operations:
        operation = placed[1]
        group = latest.get(operation["run"])
        if group is not None and operation["do"] == group[0][1]["do"] == "metrics":
            group.append(placed)
        else:
            latest[operation["run"]] = [placed]
            groups.append(latest[operation["run"]])
    return groups


def deliver(group: Sequence[Operation], spool: Spool, writer: StoreWriter) -> Exception | None:
    """Hand a group over; an operation that the store will never take is put aside.

    Gives what may be over in a while, or is the fault of one of several (`is_for_one_of`).
    """
    operation = group[0]
    if len(group) > 1:
        operation = {**operation, "points": [point for each in group for point in each["points"]]}
    try:
        writer.write(operation, spool.files(operation["files"]) if "files" in operation else None)
    except Exception as error:
        if len(group) > 1 or not will_never_be_taken(error):
            return error
        try:
            spool.refuse(operation, _first_line(error))
        except OSError as full:  # it can neither be taken nor put aside: it stays where it is
            return full
    return None


def is_for_one_of(group: Sequence[Operation], error: Exception) -> bool:
    """Whether the store will never take one of the operations, and may take the others by themselves."""
    return len(group) > 1 and will_never_be_taken(error)


def deliver_all(spool: Spool, writer: StoreWriter) -> int:
    """Hand everything over, now; gives how many operations that were. Raises what the store raises."""

    def take(group: Sequence[Operation]) -> bool:
        error = deliver(group, spool, writer)
        if error is None:
            return True
        if not is_for_one_of(group, error):
            raise error
        return all(take([operation]) for operation in group)

    with _mlflows_own_complaints_kept_back():
        return deliver_pending(spool, take)


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
