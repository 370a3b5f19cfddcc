"""What a plan does with its rows that a user may not expect, in sentences."""

from collections.abc import Callable

from loragrid.formatting import count_of
from loragrid.planning.plan import Plan
from loragrid.trials.trial import Trial


def row_notes(plan: Plan) -> list[str]:
    """One sentence for each thing that the lengths and sizes of the plan do with its rows; empty without its rows."""
    found: dict[str, None] = {}
    for trial in plan.trials:
        if (trial.model, trial.data) in plan.rows:
            found |= dict.fromkeys(note for rule in RULES if (note := rule(plan, trial)))
    return list(found)


def epochs_of(plan: Plan, trial: Trial) -> float:
    """The passes over the train rows that the trial's steps make."""
    training = trial.training
    return training.num_steps * training.batch_size / _num_train(plan, trial)


def _part_of_an_epoch(plan: Plan, trial: Trial) -> str:
    training, num_rows = trial.training, _num_train(plan, trial)
    num_trained = training.num_steps * training.batch_size
    if num_trained >= num_rows:
        return ""
    return (
        f"{count_of(training.num_steps, 'step')} of {count_of(training.batch_size, 'row')} train on {num_trained:,} of "
        f"the {num_rows:,} train rows of {trial.data.name} (training.epochs: 1 trains on each once)"
    )


def _batch_above_rows(plan: Plan, trial: Trial) -> str:
    size, num_rows = trial.training.batch_size, _num_train(plan, trial)
    if size <= num_rows:
        return ""
    return (
        f"training.batch_size: {size}: more than the {count_of(num_rows, 'train row')} of {trial.data.name}, so every "
        "step trains rows several times"
    )


def _confirmed_without_test(plan: Plan, trial: Trial) -> str:
    if plan.experiment.confirm is None or trial.data.num_test:
        return ""
    return (
        "data.num_test: 0: the settings that confirm trains again have no test rows, so the rows that chose them would "
        "judge them, and nothing is claimed about methods"
    )


RULES: tuple[Callable[[Plan, Trial], str], ...] = (_part_of_an_epoch, _batch_above_rows, _confirmed_without_test)


def _num_train(plan: Plan, trial: Trial) -> int:
    return plan.rows[(trial.model, trial.data)].num_rows.train
