"""The folder that relative paths in an experiment are relative to: the one in which its sweep was started."""

import os
from pathlib import Path


def working_folder() -> str:
    """The absolute working folder of this process; empty if it has been deleted."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def work_in(folder: str) -> None:
    """Make `folder` the working folder of this process, if this machine has it.

    Ray starts the processes of a sweep in folders of its own, where a relative path would name something else.
    """
    if folder and Path(folder).is_dir():
        os.chdir(folder)
