"""Keeps operations on disk, in order, until MLflow has them; they survive if the program is killed."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Operation = Mapping[str, Any]
"""One thing to record, as a JSON object. `StoreWriter` describes the operations."""

SPOOL_FOLDER = "spool"
"""The folder, below a storage folder, that holds the spools of its sweeps."""

MAX_DELIVERED_BYTES = 2**24
"""A larger file of operations is emptied as soon as all of them are delivered."""

_HEAD, _OPERATIONS, _POSITION, _REFUSED, _FILES, _LOCK = (
    "spool.json",
    "operations.jsonl",
    "position",
    "refused.jsonl",
    "files",
    "lock",
)


class SpoolInUseError(ValueError):
    """Another program has the spool open."""


class Spool:
    """The operations of one sweep in `folder`, appended at the end and delivered from the front.

    Only one program at a time can open it. head: what a later program must know to deliver the operations; None keeps
    the existing head.

    Raises:
        SpoolInUseError: another program has the spool open.
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
            # The file must never be incomplete, because without it the operations cannot be delivered.
            new = folder / f"{_HEAD}.new"
            new.write_text(json.dumps(dict(head)), encoding="utf-8")
            new.replace(folder / _HEAD)
        self._path = folder / _OPERATIONS
        self._drop_unfinished_line()
        self._position = os.open(folder / _POSITION, os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(self._position, b"%020d" % self._read_position(), 0)
        # The highest name, not the number of folders, because delivered folders are deleted.
        self._num_files = max((int(path.name) for path in (folder / _FILES).glob("*")), default=0)
        self._appending = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._unwritten: list[bytes] = []

    @property
    def head(self) -> dict[str, str]:
        """See `read_head`."""
        return read_head(self.folder)

    def append(self, operation: Operation) -> None:
        """Write an operation to disk, or if the disk is full keep it in memory for `write_out`."""
        if self._path.stat().st_size > MAX_DELIVERED_BYTES and self.is_empty():
            # Between the two calls the position is behind the end of the file, which means "nothing delivered".
            os.ftruncate(self._appending, 0)
            os.pwrite(self._position, b"%020d" % 0, 0)
        self._unwritten.append(json.dumps(operation).encode() + b"\n")
        self.write_out()

    def write_out(self) -> bool:
        """Write the operations that are still in memory; False if the disk is full."""
        end = self._path.stat().st_size
        try:
            while self._unwritten:
                rest = self._unwritten[0]
                while rest:
                    rest = rest[os.write(self._appending, rest) :]
                end += len(self._unwritten.pop(0))
            return True
        except OSError:
            os.ftruncate(self._appending, end)  # removes an incomplete line
            return False

    def keep_files(self, folder: Path) -> str:
        """Copy a folder into the spool; return the name by which `files` finds it."""
        self._num_files += 1
        name = f"{self._num_files:06d}"
        shutil.copytree(folder, self.files(name))
        return name

    def files(self, name: str) -> Path:
        """The folder that `keep_files` copied under this name."""
        return self.folder / _FILES / name

    def pending(self) -> Iterator[tuple[int, Operation]]:
        """Yield (position behind the operation, operation) for all that are not delivered, in order."""
        with self._path.open("rb") as stream:
            stream.seek(self._read_position())
            while (line := stream.readline()).endswith(b"\n"):
                yield stream.tell(), json.loads(line)

    def num_pending(self) -> int:
        """The number of operations that are not delivered."""
        return sum(1 for _ in self.pending())

    def is_empty(self) -> bool:
        """Whether all operations are delivered."""
        return not self._unwritten and self._read_position() == self._path.stat().st_size

    def delivered(self, position: int, operation: Operation) -> None:
        """Mark all operations before `position` as delivered; delete the files of the last of them."""
        # One write of fixed length: if the program is killed, the file holds either the old number or the new one.
        os.pwrite(self._position, b"%020d" % position, 0)
        if "files" in operation:
            shutil.rmtree(self.files(operation["files"]), ignore_errors=True)

    def refuse(self, operation: Operation, reason: str) -> None:
        """Put aside an operation that the store refuses permanently."""
        self.num_refused += 1
        with (self.folder / _REFUSED).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**operation, "reason": reason}) + "\n")

    def close(self) -> None:
        """Release the spool for other programs. It is deleted if all is delivered and nothing was put aside."""
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
        """Remove the incomplete line of a program that was killed while it wrote."""
        if self._path.exists():
            content = self._path.read_bytes()
            if not content.endswith(b"\n"):
                self._path.write_bytes(content[: content.rfind(b"\n") + 1])
        else:
            self._path.touch()


def read_head(folder: Path) -> dict[str, str]:
    """The keys `tracking_uri`, `experiment` and `sweep` of the spool in `folder`.

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
            f"{path}: is not a spool file that LoraGrid wrote: {error}; allowed: an object with experiment, sweep and "
            "tracking_uri, or no such folder"
        ) from error
    return found


def spools_in(folder: Path) -> list[Path]:
    """The folders of all spools in `folder`; they hold operations that are not delivered or were put aside."""
    return sorted(path.parent for path in folder.glob(f"*/{_HEAD}"))
