"""The cache folder for results that are slow to compute and always the same: converted models and token rows."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from loragrid.config.local_path import local_path


def cache_folder() -> Path:
    """The folder named by `LORAGRID_CACHE`, else `~/.cache/loragrid`; it may not exist yet."""
    text = os.environ.get("LORAGRID_CACHE") or "~/.cache/loragrid"
    return local_path("LORAGRID_CACHE", text, to_be_written=True)


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return `folder`; if it does not exist, `fill` writes it first.

    `fill` writes into a folder beside it, which is renamed when complete, so a reader never sees an incomplete folder,
    even if the writer is killed. A lock lets one process do the work while others wait.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=folder.name + ".unfinished-", dir=folder.parent))
        try:
            fill(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
