"""Delivers a spool to MLflow in the background: in order for each run, with retries while the store fails."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence

from loragrid.tracking.mlflow_internals import silent_store_errors
from loragrid.tracking.mlflow_writer import StoreWriter, is_permanent
from loragrid.tracking.spool import Operation, Spool

SECONDS_BETWEEN_TRIES = (0.5, 1.0, 2.0, 5.0)
SECONDS_BEFORE_NOTICE = 5.0
"""How long the store must fail before the user is notified."""

SECONDS_BETWEEN_DELIVERIES = 2.0
"""A call takes a store about ten milliseconds, however small it is, and sixty-four trials of a pack report every
second. Therefore operations are collected for this long and then sent as one call per run."""

MAX_OPERATIONS_AT_ONCE = 1000

PlacedOperation = tuple[int, Operation]
"""(Position in the spool behind the operation, operation)."""


class Delivery:
    """A thread that delivers the operations of a spool through a writer.

    notify: receives a sentence for the user when the store fails and when it answers again.
    """

    def __init__(self, spool: Spool, writer: StoreWriter, notify: Callable[[str], None]) -> None:
        self._spool, self._writer, self._notify = spool, writer, notify
        self._wake, self._stop, self._hurry = threading.Event(), threading.Event(), threading.Event()
        self._failing_since: float | None = None
        self._has_notified = False
        self._thread = threading.Thread(target=self._run, name="loragrid-delivery", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Notify the thread that the spool has a new operation."""
        self._wake.set()

    def wait(self, patience_seconds: float) -> bool:
        """Wait until everything is delivered; False once the store or the disk has failed for `patience_seconds`.

        Failures before the call do not count towards `patience_seconds`.
        """
        start = time.monotonic()
        full_since: float | None = None
        self._hurry.set()
        try:
            while not self._spool.is_empty():
                if not self._thread.is_alive():  # Python has printed the exception that ended it
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
        """Stop after the current call; the remaining operations stay in the spool."""
        self._stop.set()
        self._wake.set()
        self._hurry.set()
        self._thread.join()

    def _run(self) -> None:
        with silent_store_errors():
            while True:
                self._wake.clear()
                if self._stop.is_set():  # checked after `clear`, which could undo the wake-up by `close`
                    return
                start = time.monotonic()
                deliver_pending(self._spool, self._deliver)
                self._wake.wait()
                self._hurry.wait(max(0.0, start + SECONDS_BETWEEN_DELIVERIES - time.monotonic()))

    def _deliver(self, group: Sequence[Operation]) -> bool:
        """Try until the store has accepted or refused the operations; False if `close` was called first."""
        tries = 0
        while not self._stop.is_set():
            error = deliver(group, self._spool, self._writer)
            if error is None:
                self._note_success()
                return True
            if must_be_split(group, error):
                return all(self._deliver([operation]) for operation in group)
            self._note_failure(error)
            self._stop.wait(SECONDS_BETWEEN_TRIES[min(tries, len(SECONDS_BETWEEN_TRIES) - 1)])
            tries += 1
        return False

    def _note_failure(self, error: Exception) -> None:
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        elif not self._has_notified and now - self._failing_since > SECONDS_BEFORE_NOTICE:
            self._has_notified = True
            reason = _first_line(error)
            self._notify(f"MLflow does not answer ({reason}); training continues; the record is kept on disk")

    def _note_success(self) -> None:
        if self._has_notified:
            self._notify("MLflow answers again")
        self._failing_since, self._has_notified = None, False


def deliver_pending(spool: Spool, send: Callable[[Sequence[Operation]], bool]) -> int:
    """Send all pending operations, in groups of one MLflow call each; return how many were delivered.

    If `send` returns False or raises, the remaining operations stay in the spool. Operations of other runs that were
    already sent may be sent again later, as happens after a program is killed.
    """
    num_delivered = 0
    pending = spool.pending()
    while window := list(itertools.islice(pending, MAX_OPERATIONS_AT_ONCE)):
        num_in_window = _deliver_window(window, spool, send)
        num_delivered += num_in_window
        if num_in_window < len(window):
            break
    return num_delivered


def _deliver_window(
    window: Sequence[PlacedOperation], spool: Spool, send: Callable[[Sequence[Operation]], bool]
) -> int:
    sent: set[int] = set()
    num_delivered = 0
    for group in grouped(window):
        if not send([operation for _, operation in group]):
            break
        sent.update(position for position, _ in group)
        while num_delivered < len(window) and window[num_delivered][0] in sent:
            spool.delivered(*window[num_delivered])
            num_delivered += 1
    return num_delivered


def grouped(operations: Sequence[PlacedOperation]) -> list[list[PlacedOperation]]:
    """Group consecutive metric operations of each run; every other operation is a group of its own.

    The operations of each run keep their order.
    """
    groups: list[list[PlacedOperation]] = []
    latest: dict[str, list[PlacedOperation]] = {}
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
    """Write a group to the store; put a single operation aside if the store refuses it permanently.

    Returns None if the group is done, else the error. The error may pass, or the group `must_be_split`.
    """
    operation = group[0]
    if len(group) > 1:
        operation = {**operation, "points": [point for each in group for point in each["points"]]}
    try:
        writer.write(operation, spool.files(operation["files"]) if "files" in operation else None)
    except Exception as error:
        if len(group) > 1 or not is_permanent(error):
            return error
        try:
            spool.refuse(operation, _first_line(error))
        except OSError as disk_error:  # the operation stays in the spool
            return disk_error
    return None


def must_be_split(group: Sequence[Operation], error: Exception) -> bool:
    """Whether the store refuses the group permanently, but may accept some of its operations one by one."""
    return len(group) > 1 and is_permanent(error)


def deliver_all(spool: Spool, writer: StoreWriter) -> int:
    """Deliver every operation without retries; return their number. Raises whatever the store raises."""

    def send(group: Sequence[Operation]) -> bool:
        error = deliver(group, spool, writer)
        if error is None:
            return True
        if not must_be_split(group, error):
            raise error
        return all(send([operation]) for operation in group)

    with silent_store_errors():
        return deliver_pending(spool, send)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
