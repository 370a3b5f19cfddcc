"""The environment of a trial as MLflow tags: versions, git commit, processor, GPU; never a host or user name."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loragrid.trials.tags import CHANGES_TAG, DIRTY_TAG

PACKAGES = ("loragrid", "torch", "transformers", "datasets", "ray", "mlflow")

PROGRAM_TIMEOUT_SECONDS = 10.0
"""A program that does not answer must not delay the start of a sweep."""


def environment_tags() -> dict[str, str]:
    """All tags of this module; facts that cannot be determined have no tag."""
    return {**version_tags(), **commit_tags(Path(__file__).parents[1]), **hardware_tags()}


def version_tags() -> dict[str, str]:
    """`loragrid.version.<package>`, read from installed metadata without importing the packages."""
    tags = {"loragrid.version.python": platform.python_version()}
    for package in PACKAGES:
        try:
            tags[f"loragrid.version.{package}"] = version(package)
        except PackageNotFoundError:
            # A cluster may get the source tree without an installation; the commit identifies it.
            tags[f"loragrid.version.{package}"] = "not installed"
    return tags


def commit_tags(source: Path) -> dict[str, str]:
    """The commit of the checkout that holds `source` and whether it has uncommitted changes; `{}` outside a checkout.

    A virtual environment with the installed package is often inside the checkout of another project, so only a checkout
    that tracks `source` counts.
    """
    if not _answer(["git", "-C", str(source), "ls-files", "--", "."]):
        return {}
    commit = _answer(["git", "-C", str(source), "rev-parse", "HEAD"])
    if not commit:
        return {}
    top = _answer(["git", "-C", str(source), "rev-parse", "--show-toplevel"]) or str(source)
    changes = _answer(["git", "-C", top, "status", "--porcelain"])
    tags = {
        "mlflow.source.git.commit": commit,
        DIRTY_TAG: "unknown" if changes is None else str(bool(changes)).lower(),
    }
    if changes:
        # Other uncommitted changes on the same commit are other code. Untracked files count only by their names.
        code = (_answer(["git", "-C", top, "diff", "HEAD"]) or "") + changes
        tags[CHANGES_TAG] = f"sha256:{hashlib.sha256(code.encode()).hexdigest()}"
    return tags


def hardware_tags() -> dict[str, str]:
    """Processor, number of usable cores and, through `nvidia-smi`, GPUs and driver.

    torch is not used, because it would open a CUDA context in a process that trains nothing.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    tags = {"loragrid.system": f"{sys.platform} {platform.machine()}", "loragrid.cpu.num_cores": str(num_cores)}
    answer = _answer(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if answer:
        rows = [tuple(part.strip() for part in line.split(",")) for line in answer.splitlines()]
        names = [row[0] for row in rows]
        tags["loragrid.gpu"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
        tags["loragrid.gpu.driver"] = ", ".join(dict.fromkeys(row[-1] for row in rows))
    return tags


def _answer(command: Sequence[str]) -> str | None:
    """The program's output; None if it is missing, fails or does not answer."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
