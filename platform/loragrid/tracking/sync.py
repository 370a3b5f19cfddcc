"""Delivers the records that sweeps left on disk because MLflow did not answer or the program died."""

from pathlib import Path

from loragrid.config.local_path import local_path
from loragrid.tracking.delivery import deliver_all
from loragrid.tracking.mlflow_experiment import MlflowExperiment
from loragrid.tracking.spool import SPOOL_FOLDER, Spool, read_head, spools_in


def sync_storage(storage: str | Path) -> dict[str, int]:
    """Deliver the records that sweeps left in a storage folder; return sweep -> number of delivered operations.

    storage: the `storage.path` of the experiment. The result is empty if everything was delivered before.

    Raises:
        ValueError: there is no such folder, a sweep is still running, or MLflow does not accept the record.
    """
    folder = local_path("--storage", str(storage))
    if not folder.is_dir():
        raise ValueError(f"--storage {storage}: no such folder; allowed: the `storage.path` of a sweep that was run")
    return sync(folder.resolve() / SPOOL_FOLDER)


def sync(folder: Path, experiment_name: str | None = None) -> dict[str, int]:
    """Deliver the spools in `folder`, of one experiment or of all; return sweep -> number of operations.

    Raises:
        ValueError: a sweep is still running, or MLflow does not accept its record.
    """
    delivered = {}
    for path in spools_in(folder):
        # Read before the spool is locked, because another experiment's sweep may be running.
        head = read_head(path)
        if experiment_name not in (None, head["experiment"]):
            continue
        spool = Spool(path)
        try:
            experiment = MlflowExperiment(head["experiment"], head["tracking_uri"])
            number = deliver_all(spool, experiment.writer(head["sweep"]))
            if number:  # a spool that holds only refused operations is kept for the user
                delivered[head["sweep"]] = number
        except ValueError:
            raise
        except Exception as error:  # from MLflow, a database driver, the system or an object store
            raise ValueError(
                f"{head['tracking_uri']} did not accept the record of {head['sweep']}: {error}; it is kept in {path}"
            ) from error
        finally:
            spool.close()
    return delivered
