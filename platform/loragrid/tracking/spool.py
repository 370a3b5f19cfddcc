"""Keeps what is to be recorded on disk, in order, until MLflow has it; a program that dies leaves it for the next."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Operation = Mapping[str, Any]
"""One thing to record, as JSON can hold it; what they are: `StoreWriter`."""

SPOOL_FOLDER = "spool"
"""The folder, below a storage folder, in which the record of its sweeps waits for MLflow."""

START_ANEW_BYTES = 2**24
"""Beyond this, a file of which all is delivered is emptied."""

_HEAD, _OPERATIONS, _POSITION, _REFUSED, _FILES, _LOCK = (
    "spool.json",
    "operations.jsonl",
    "position",
    "refused.jsonl",
    "files",
    "lock",
)


class SpoolInUseError(ValueError):
    """Another program writes to the spool or delivers it."""


class Spool:
    """The operations of one sweep in `folder`: appended by the program that holds it, delivered from the front.

    head: what a later program must know to deliver the rest; kept from the first time on.
    """

    def __init__(self, folder: Path, head: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.num_refused = 0
        self._lock = FileLock(folder / _LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SpoolInUseError(f"{folder}: a program that is still running records this sweep") from None
        if head is not None:
            # Whole or not at all: without it nobody can deliver the rest.
            new = folder / f"{_HEAD}.new"
            new.write_text(json.dumps(dict(head)), encoding="utf-8")
            new.replace(folder / _HEAD)
        self._path = folder / _OPERATIONS
        self._drop_unfinished_line()
        self._position = os.open(folder / _POSITION, os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(self._position, b"%020d" % self._read_position(), 0)
        # Not how many there are: of those that were delivered the folders are gone.
        self._num_files = max((int(path.name) for path in (folder / _FILES).glob("*")), default=0)
        self._appending = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._unwritten: list[bytes] = []

    @property
    def head(self) -> dict[str, str]:
        """What was given when the spool was made.

        Raises:
            ValueError: this folder is no spool.
        """
        return read_head(self.folder)

    def append(self, operation: Operation) -> None:
        """Keep an operation; it outlives this program from here on, or from when the disk has room again."""
        if self._path.stat().st_size > START_ANEW_BYTES and self.is_empty():
            # The old position lies behind the end until it is set: nobody takes that for something to deliver.
            os.ftruncate(self._appending, 0)
            os.pwrite(self._position, b"%020d" % 0, 0)
        self._unwritten.append(json.dumps(operation).encode() + b"\n")
        self.write_out()

    def write_out(self) -> bool:
        """Write what the disk had no room for; False if it still has none."""
        end = self._path.stat().st_size
        try:
            while self._unwritten:
                rest = self._unwritten[0]
                while rest:
                    rest = rest[os.write(self._appending, rest) :]
                end += len(self._unwritten.pop(0))
            return True
        except OSError:
            os.ftruncate(self._appending, end)  # no half a line
            return False

    def keep_files(self, folder: Path) -> str:
        """Copy a folder into the spool; gives the name under which `files` finds it."""
        self._num_files += 1
        name = f"{self._num_files:06d}"
        shutil.copytree(folder, self.files(name))
        return name

    def files(self, name: str) -> Path:
        """A folder that `keep_files` copied."""
        return self.folder / _FILES / name

    def pending(self) -> Iterator[tuple[int, Operation]]:
        """(Position behind it, operation), in order, of all that is not delivered."""
        with self._path.open("rb") as stream:
            stream.seek(self._read_position())
            while (line := stream.readline()).endswith(b"\n"):
                yield stream.tell(), json.loads(line)

    def num_pending(self) -> int:
        """How many operations wait."""
        return sum(1 for _ in self.pending())

    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._unwritten and self._read_position() == self._path.stat().st_size

    def delivered(self, position: int, operation: Operation) -> None:
        """The operations up to `position`, of which this is the last, need not be delivered again."""
        # In one write over the same bytes: a program that is killed leaves the old number or the new one.
        os.pwrite(self._position, b"%020d" % position, 0)
        if "files" in operation:
            shutil.rmtree(self.files(operation["files"]), ignore_errors=True)

    def refuse(self, operation: Operation, reason: str) -> None:
        """Put an operation aside that the store will never take."""
        self.num_refused += 1
        with (self.folder / _REFUSED).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**operation, "reason": reason}) + "\n")

    def close(self) -> None:
        """Let another program have the spool; one that is empty, with nothing put aside, is deleted."""
        self.write_out()
        os.close(self._appending)
        done = self.is_empty() and not (self.folder / _REFUSED).exists()
        os.close(self._position)
        self._lock.release()
        if done:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read_position(self) -> int:
        position = int(os.pread(self._position, 20, 0) or b"0")
        return position if position <= self._path.stat().st_size else 0

    def _drop_unfinished_line(self) -> None:
        """A program that was killed while it wrote leaves half a line."""
        if self._path.exists():
            content = self._path.read_bytes()
            if not content.endswith(b"\n"):
                self._path.write_bytes(content[: content.rfind(b"\n") + 1])
        else:
            self._path.touch()


def read_head(folder: Path) -> dict[str, str]:
    """What was given when the spool in `folder` was made.

    Raises:
        ValueError: the folder is no spool.
    """
    path = folder / _HEAD
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no spool") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: no program has written this: {error}; allowed: an object with experiment, sweep and "
            "tracking_uri, or no such folder"
        ) from error
    return found


def spools_in(folder: Path) -> list[Path]:
    """The folders of all spools in `folder`, in which something waits or was put aside."""
    return sorted(path.parent for path in folder.glob(f"*/{_HEAD}"))
