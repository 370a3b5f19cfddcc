"""The folder for what is slow to compute and always comes out the same: the converted embedded model and token rows."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_folder() -> Path:
    """The folder named by `LORAGRID_CACHE`, else `~/.cache/loragrid`; it may not exist yet."""
    return Path(os.environ.get("LORAGRID_CACHE") or "~/.cache/loragrid").expanduser()


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Give `folder`, and if it is not there yet let `fill` write it first.

    `fill` writes into a folder beside it, which is renamed when complete: a reader never sees half a folder, even
    when the writer is killed. A lock lets one of several processes do the work while the others wait for it.
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
