"""Where an experiment's files lie: half-trained trials, and the record on its way to MLflow."""

from pathlib import Path

from loragrid.config import Experiment
from loragrid.local_path import local_path
from loragrid.trial_store import TrialStore


def storage_folder(experiment: Experiment) -> Path:
    """Where checkpoints and results lie, absolute: Ray's processes have working folders of their own.

    Raises:
        ValueError: no folder of this machine.
    """
    if "://" in experiment.storage.path:
        raise ValueError(
            f"storage.path: {experiment.storage.path}: is a URI; allowed: a folder, mounted if it is remote"
        )
    return local_path("storage.path", experiment.storage.path).resolve()


def trial_store(experiment: Experiment, sweep: str) -> TrialStore:
    """Where a sweep's half-trained trials lie."""
    return TrialStore(str(storage_folder(experiment) / "trials" / sweep))


def spool_folder(experiment: Experiment) -> Path:
    """Where the record waits for MLflow."""
    return storage_folder(experiment) / "spool"
