"""The cache folder for results that are slow to compute and always the same: converted models and token rows."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from loragrid.config.local_path import local_path

Content = TypeVar("Content")


class DamagedError(ValueError):
    """What is in the cache is not what was written."""


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
    with _lock(folder):
        if not folder.is_dir():
            _fill(folder, fill)
    return folder


def read_cached(folder: Path, fill: Callable[[Path], None], load: Callable[[Path], Content]) -> tuple[Content, str]:
    """What `load` reads from `cached_folder`, and "" or the damage because of which `fill` wrote the folder again.

    load: raises DamagedError if the folder is not as `fill` wrote it. One process mends while others wait.
    """
    try:
        return load(cached_folder(folder, fill)), ""
    except DamagedError:
        with _lock(folder):
            try:
                return load(folder), ""  # another process was faster
            except DamagedError as error:
                damage = str(error)
            shutil.rmtree(folder, ignore_errors=True)
            _fill(folder, fill)
            return load(folder), damage


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(folder.name + ".lock"))


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=folder.name + ".unfinished-", dir=folder.parent))
    try:
        fill(unfinished)
        if folder.is_file():
            folder.unlink()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
