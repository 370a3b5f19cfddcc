"""Hashes of large files, remembered between processes."""

import hashlib
import os
import tempfile
import time
from pathlib import Path

from loragrid.models.cache import cache_folder

SETTLED_SECONDS = 2.0
"""Hashes of younger files are not remembered: a file can change twice within one tick of its file system's clock."""


def file_sha256(path: Path) -> str:
    """The hex digest of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """As `file_sha256`, but all processes together read a file only once per path, size and modification time."""
    before = _state(path)
    note = cache_folder() / "hashes" / hashlib.sha256(before.encode()).hexdigest()
    if note.is_file():
        return note.read_text(encoding="ascii")
    digest = file_sha256(path)
    if _state(path) == before and time.time() - path.stat().st_mtime > SETTLED_SECONDS:
        note.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: a reader never sees an incomplete digest.
        handle, unfinished = tempfile.mkstemp(dir=note.parent, prefix="unfinished-")
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(digest)
        Path(unfinished).rename(note)
    return digest


def _state(path: Path) -> str:
    found = path.stat()
    return f"{path.resolve()}\n{found.st_size}\n{found.st_mtime_ns}"
