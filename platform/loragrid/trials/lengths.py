"""Completes trials with what only their rows tell: steps for epochs, and the numbers that the experiment leaves open.

This is the one place at which a length in epochs becomes steps: after the rows are read, before anything is planned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from loragrid.config.checks import grace_problems
from loragrid.config.execution import EarlyStoppingConfig
from loragrid.config.method_settings import Scalar
from loragrid.config.sections import TrainingConfig
from loragrid.schema.errors import ExperimentError, Problem, problems_of
from loragrid.trials.trial import Trial, make_trial_id

LENGTHS = {"epochs": "steps", "warmup_ratio": "warmup_steps"}
"""Key in units of the rows -> the key in steps that it becomes."""


@dataclass(frozen=True, kw_only=True)
class NumRows:
    """The numbers of rows that a trial's data really have; forgetting: pieces of held-out text."""

    train: int
    forgetting: int = 0


def complete(
    trials: Sequence[Trial], rows_of: Callable[[Trial], NumRows], early_stopping: EarlyStoppingConfig | None = None
) -> list[Trial]:
    """The trials with lengths in steps and ids that follow from them, in the given order.

    A trial has the same id as one whose steps are written down: both train the same.

    Raises:
        ExperimentError: a length is impossible for the rows, or two trials become equal.
    """
    completed: dict[str, Trial] = {}
    for trial in trials:
        found = complete_trial(trial, rows_of(trial))
        if trial.training.epochs is not None:
            problems = list(grace_problems(early_stopping, found.training.num_steps))
            if problems:
                raise ExperimentError([replace(p, what=f"{p.what} ({_length(trial)})") for p in problems])
        if found.trial_id in completed:
            steps, other = found.training.num_steps, completed[found.trial_id]
            what = f"{_length(other)} and {_length(trial)} are both {steps} steps: {found.trial_id} would run twice"
            raise ExperimentError([Problem(key="training.epochs", what=what, allowed="every trial once")])
        completed[found.trial_id] = found
    return list(completed.values())


def complete_trial(trial: Trial, rows: NumRows) -> Trial:
    """The trial with its length in steps; `found` and `written` hold what is recorded beside it.

    Raises:
        ExperimentError: see `complete`.
    """
    training = trial.training
    try:
        in_steps = training.in_steps(rows.train)
    except ValidationError as error:
        problems = [problem.under("training") for problem in problems_of(error, TrainingConfig)]
        raise ExperimentError([replace(p, what=f"{p.what} ({_length(trial)})") for p in problems]) from None
    try:
        trial.method.check_steps(in_steps.num_steps)
    except ValueError as error:
        what = f"{error} ({_length(trial)} of {rows.train} rows: {in_steps.num_steps} steps)"
        raise ExperimentError([Problem(key=f"methods: {trial.method.name}", what=what)]) from None
    open_lengths = [key for key in LENGTHS if getattr(training, key) is not None]
    found: dict[str, Scalar] = {
        f"training.{LENGTHS[key]}": getattr(in_steps, LENGTHS[key]) for key in open_lengths
    } | _open_numbers(trial, rows)
    identity = (trial.method, trial.seed, trial.model, trial.data, in_steps, trial.task)
    return replace(
        trial,
        trial_id=make_trial_id(*identity),
        training=in_steps,
        found=found,
        asked_id=trial.trial_id if training.epochs is not None else "",
        written={f"training.{key}": getattr(training, key) for key in open_lengths},
    )


def _open_numbers(trial: Trial, rows: NumRows) -> dict[str, Scalar]:
    """The numbers of rows that are null in the experiment, as really used."""
    found: dict[str, Scalar] = {}
    if trial.data.num_train is None:
        found["data.num_train"] = rows.train
    if trial.data.forgetting_name is not None and trial.data.num_forgetting is None:
        found["data.num_forgetting"] = rows.forgetting
    return found


def _length(trial: Trial) -> str:
    """The length as it is written: "training.epochs: 0.5 at batch size 8"."""
    epochs = trial.written.get("training.epochs", trial.training.epochs)
    if epochs is None:
        return f"training.steps: {trial.training.steps}"
    return f"training.epochs: {epochs:g} at batch size {trial.training.batch_size}"
