"""Hashes of large files, remembered between processes."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from loragrid.models.cache import cache_folder

SETTLED_SECONDS = 2.0
"""Hashes of younger files are not remembered: a file can change twice within one tick of its file system's clock."""


_PIECE = 2**24
"""Bytes that are read at once."""


def file_sha256(path: Path) -> str:
    """The hex digest of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256s(path: Path) -> dict[str, str]:
    """Each tensor of a safetensors file -> the hex digest of its type, shape and values.

    The layout is that of the safetensors format: eight bytes with the header's length, the header in JSON, the values.
    A file that has another layout counts as one tensor with the file's name.
    """
    size, digests = path.stat().st_size, dict[str, str]()
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length < size else b"")
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
                file.seek(8 + length + begin)
                for start in range(begin, min(end, size), _PIECE):
                    digest.update(file.read(min(_PIECE, end - start)))
                digests[name] = digest.hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):
        return {path.name: file_sha256(path)}
    return digests


def remembered_sha256(path: Path) -> str:
    """As `file_sha256`, but all processes together read a file only once per path, size and modification time."""
    return _remembered(path, "", file_sha256)


def remembered_tensor_sha256s(path: Path) -> dict[str, str]:
    """As `tensor_sha256s`, remembered like `remembered_sha256`."""
    text = _remembered(path, "tensors\n", lambda path: json.dumps(tensor_sha256s(path)))
    digests: dict[str, str] = json.loads(text)
    return digests


def _remembered(path: Path, kind: str, compute: Callable[[Path], str]) -> str:
    before = _state(path)
    note = cache_folder() / "hashes" / hashlib.sha256(f"{kind}{before}".encode()).hexdigest()
    if note.is_file():
        return note.read_text(encoding="ascii")
    digest = compute(path)
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
