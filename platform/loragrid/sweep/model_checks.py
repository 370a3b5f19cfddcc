"""Checks the models of a plan before anything is started."""

from loragrid.models.base_checks import check_before_training
from loragrid.planning.plan import Plan


def check_models(plan: Plan) -> None:
    """Check each model as far as one process can that must not hold all its weights.

    Raises:
        ValueError: a model cannot be trained; nothing was started.
    """
    for model in dict.fromkeys(trial.model for trial in plan.trials):
        check_before_training(model)
