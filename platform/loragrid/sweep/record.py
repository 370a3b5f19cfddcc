"""Opens the record of a sweep in MLflow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loragrid.comparison.experiment_file import keep_experiment
from loragrid.config.experiment import Experiment
from loragrid.config.local_path import reason_of
from loragrid.data.dataset import TokenizedData
from loragrid.data.record import common_record
from loragrid.planning.plan import Plan
from loragrid.planning.time_estimate import ESTIMATE_TAG, TimeEstimate
from loragrid.sweep.storage import check_storage, spool_folder
from loragrid.tracking.previous_run import RESUMED_TAG, TRIALS_TAG, PreviousSweep, identify
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import default_tracking_uri, tracking_origin
from loragrid.trials.tags import QUESTION_TAG
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One sweep: its name and experiment, where its record and its states go, and the record of its earlier runs."""

    name: str
    experiment: Experiment
    recorder: Recorder
    store: TrialStore
    previous: PreviousSweep | None = None

    @property
    def tune_name(self) -> str:
        """Tune's own name of the sweep; it changes each time the sweep is resumed.

        Under an equal name Tune and Train would continue from their old files, without knowing that packs have changed.
        """
        return self.name if self.previous is None else f"{self.name}.resumed-{self.previous.num_resumed + 1}"


def open_recorder(experiment: Experiment, notify: Callable[[str], None] = lambda sentence: None) -> Recorder:
    """The recorder of this experiment in MLflow; checks first that the storage can be written.

    Raises:
        ValueError: the folder cannot be written, or MLflow cannot open its store.
    """
    uri = default_tracking_uri(experiment.storage.path, experiment.tracking.uri)
    check_storage(experiment)
    try:
        return Recorder(experiment.name, uri, spool_folder=spool_folder(experiment), notify=notify)
    except ValueError:
        raise
    except Exception as error:  # of many kinds: MLflow's, SQLAlchemy's, a database driver's, the system's
        origin = tracking_origin(experiment.tracking.uri)
        raise ValueError(f"{origin}: {uri}: MLflow cannot open its store there: {reason_of(error)}") from error


def open_sweep(sweep: Sweep, whole_plan: Plan) -> None:
    """Start or continue the sweep's run; delete the states of trials that will not continue from them."""
    recorder, store, previous, experiment = sweep.recorder, sweep.store, sweep.previous, sweep.experiment
    trial_ids = {trial.trial_id for trial in whole_plan.trials}
    tags = {TRIALS_TAG: identify(trial_ids)}
    if previous is None:
        recorder.start_sweep(
            sweep.name, sweep_parameters(experiment, whole_plan.trials), {QUESTION_TAG: experiment.question, **tags}
        )
        keep_experiment(recorder, experiment)
        store.delete(trial_ids)
    else:
        recorder.resume_sweep(sweep.name, {RESUMED_TAG: str(previous.num_resumed + 1), **tags})
        store.delete(previous.outcome.statuses)  # the driver may have been killed before it deleted them
        store.reopen(trial_ids | previous.begun.keys())  # among the begun are trials that confirm
        keep_experiment(recorder, experiment)  # the experiment may have more trials now


def record_rows(recorder: Recorder, all_data: Sequence[TokenizedData]) -> None:
    """Record what the data sets of the sweep have in common about their rows."""
    recorder.log_sweep_summary(*common_record(all_data))


def record_estimate(recorder: Recorder, estimate: TimeEstimate) -> None:
    """Record the estimated seconds of the sweep, if there is a timing for each of its pack shapes."""
    if estimate.sweep_seconds is not None:
        metrics = {"sweep/estimated_seconds": estimate.sweep_seconds}
        recorder.log_sweep_summary(metrics, {ESTIMATE_TAG: ", ".join(estimate.sources)})


def sweep_parameters(experiment: Experiment, trials: Sequence[Trial] = ()) -> dict[str, object]:
    """The whole experiment as the flat parameters of the sweep's run: dotted key -> value.

    trials: a value that all of them found in their rows replaces the null of the experiment.
    """
    flat: dict[str, object] = {}
    for section, value in experiment.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": item for key, item in value.items()}
        else:
            flat[section] = value
    found = [trial.found.items() for trial in trials]
    return flat | {key: value for key, value in (found[0] if found else ()) if all((key, value) in o for o in found)}
