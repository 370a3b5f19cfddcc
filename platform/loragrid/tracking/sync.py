"""Delivers to MLflow what a sweep could not: the store was away, or the program died."""

from pathlib import Path

from loragrid.tracking.delivery import deliver_all
from loragrid.tracking.mlflow_writer import StoreWriter
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.spool import SPOOL_FOLDER, Spool, read_head, spools_in


def sync_storage(storage: str | Path) -> dict[str, int]:
    """Deliver to MLflow what sweeps stored in `storage` could not: sweep -> number of operations delivered.

    storage: the folder that the experiment names as `storage.path`. The dictionary is empty if nothing waited.

    Raises:
        ValueError: there is no such folder, a sweep is still running, or MLflow does not take the record.
    """
    folder = Path(storage).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--storage {storage}: no such folder; allowed: the `storage.path` of a sweep that was run")
    return sync(folder.resolve() / SPOOL_FOLDER)


def sync(folder: Path, experiment_name: str | None = None) -> dict[str, int]:
    """Deliver what waits in `folder` for MLflow, of one experiment or of all: sweep -> number of operations.

    Raises:
        ValueError: a sweep is still running, or MLflow does not take its record.
    """
    delivered = {}
    for path in spools_in(folder):
        # Read before the spool is taken: another experiment's sweep may be running.
        head = read_head(path)
        if experiment_name not in (None, head["experiment"]):
            continue
        spool = Spool(path)
        try:
            recorder = Recorder(head["experiment"], head["tracking_uri"])
            writer = StoreWriter(head["tracking_uri"], recorder.experiment_id, head["sweep"])
            number = deliver_all(spool, writer)
            if number:  # a spool with nothing but what MLflow has refused stays, to be looked at
                delivered[head["sweep"]] = number
        except ValueError:
            raise
        except Exception as error:  # MLflow's, a database driver's, the system's, an object store's
            raise ValueError(
                f"{head['tracking_uri']} does not take the record of {head['sweep']}: {error}; it is kept in {path}"
            ) from error
        finally:
            spool.close()
    return delivered
