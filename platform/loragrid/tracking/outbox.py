"""Holds the operations of an open sweep until MLflow has them: a spool on disk and the thread that delivers it."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loragrid.formatting import count_of
from loragrid.tracking.delivery import Delivery
from loragrid.tracking.mlflow_experiment import MlflowExperiment
from loragrid.tracking.spool import Operation, Spool
from loragrid.tracking.store_uri import MAX_PARAMETER_LENGTH, MAX_TAG_LENGTH, RunStatus, cut, format_parameter

_SOURCE_TAGS = {"mlflow.source.name": "loragrid", "mlflow.source.type": "LOCAL"}

Point = tuple[str, float, int, int]
"""A value of a metric: key, value, milliseconds since 1970, step."""


class Outbox:
    """Records operations on the runs of one sweep, and delivers them in the background.

    Every method returns as soon as the operation is on disk. `run` is a trial id or `SWEEP_ITSELF`; times are
    milliseconds since 1970. The operations are described at `StoreWriter`.

    folder: the spool; None: a temporary folder. notify: see `Delivery`.

    Raises:
        SpoolInUseError: another program records this sweep.
    """

    def __init__(
        self, folder: Path | None, experiment: MlflowExperiment, sweep: str, notify: Callable[[str], None]
    ) -> None:
        head = {"tracking_uri": experiment.tracking_uri, "experiment": experiment.name, "sweep": sweep}
        self.spool = Spool(folder or Path(tempfile.mkdtemp(prefix="loragrid-spool-")), head)
        self.writer = experiment.writer(sweep)
        self._notify = notify
        self._delivery = Delivery(self.spool, self.writer, notify)

    def start_run(
        self, run: str, name: str, time: int, parameters: Mapping[str, object], tags: Mapping[str, str]
    ) -> None:
        """Open a run. Parameters and tags that are too long for MLflow are cut."""
        self._record(
            "start",
            run,
            name=name,
            time=time,
            parameters={k: cut(format_parameter(value), MAX_PARAMETER_LENGTH) for k, value in parameters.items()},
            tags=_cut_tags({**_SOURCE_TAGS, **tags}),
        )

    def reopen_run(self, run: str) -> None:
        """Set a run that has ended, or whose program died, to RUNNING."""
        self._record("reopen", run)

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Add values to a run's metrics."""
        if points:
            self._record("metrics", run, points=points)

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run. Values that are too long for MLflow are cut."""
        self._record("tags", run, tags=_cut_tags(tags))

    def log_files(self, run: str, folder: Path, artifact_path: str) -> None:
        """Copy the files of a folder into the spool, and from there to the run's artifacts."""
        self._record("artifacts", run, files=self.spool.keep_files(folder), path=artifact_path)

    def end_run(self, run: str, status: RunStatus, time: int) -> None:
        """Close a run."""
        self._record("end", run, status=status, time=time)

    def wait(self, patience_seconds: float) -> bool:
        """Wait until MLflow has every operation; see `Delivery.wait`."""
        return self._delivery.wait(patience_seconds)

    def close(self, patience_seconds: float) -> bool:
        """Wait as `wait` does, then stop the delivery. What MLflow does not have stays in the spool."""
        is_delivered = self.wait(patience_seconds)
        self._delivery.close()
        if self.spool.num_refused:
            self._notify(
                f"MLflow permanently refused {count_of(self.spool.num_refused, 'part')} of the record; the "
                f"refused parts and the reasons are in {self.spool.folder}"
            )
        self.spool.close()
        return is_delivered

    def _record(self, do: str, run: str, **fields: object) -> None:
        operation: Operation = {"do": do, "run": run, **fields}
        self.spool.append(operation)
        self._delivery.wake()


def _cut_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: cut(value, MAX_TAG_LENGTH) for name, value in tags.items()}
