"""Finds free names for the sweeps of an experiment, in MLflow and among records that MLflow does not have yet."""

from pathlib import Path

from loragrid.tracking.mlflow_experiment import MlflowExperiment
from loragrid.tracking.spool import spools_in


class SweepNames:
    """The names of an experiment's sweeps. spool_folder: holds the spools of its sweeps; None: there are none."""

    def __init__(self, experiment: MlflowExperiment, spool_folder: Path | None) -> None:
        self._experiment, self._spool_folder = experiment, spool_folder

    def next_free(self) -> str:
        """The experiment's name with the next free number: the first sweep is `<experiment>-1`."""
        return next(name for name in self._experiment.free_sweep_names() if not self._is_spooled(name))

    def check_free(self, name: str) -> None:
        """Check that a new sweep can have this name.

        Raises:
            ValueError: MLflow or the spool folder has a sweep of that name; the message names the ways out.
        """
        if self._is_spooled(name):
            raise ValueError(
                f"--name: the record of a sweep {name!r} waits in {self._spool_folder} for MLflow; allowed: `loragrid "
                "sync` and then --resume, or another name"
            )
        if self._experiment.has_sweep(name):
            raise ValueError(
                f"--name: experiment {self._experiment.name!r} has a sweep {name!r} already; allowed: --resume to "
                "continue it, or another name"
            )

    def _is_spooled(self, name: str) -> bool:
        return self._spool_folder is not None and self._spool_folder / name in spools_in(self._spool_folder)
