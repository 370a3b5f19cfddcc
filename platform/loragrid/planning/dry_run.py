"""The dry run: everything that `run` checks before it opens MLflow and starts Ray, as one function for both."""

from collections.abc import Callable

from loragrid.config.experiment import Experiment
from loragrid.config.tracking_uri import default_tracking_uri
from loragrid.models.loading import check_weights
from loragrid.planning.plan import Plan, plan
from loragrid.planning.rows import ReadRows, read_rows, sentences_about
from loragrid.trials.expand import expand


def dry_run(experiment: Experiment) -> Plan:
    """The plan of an experiment on its rows, which are read and tokenised; starts nothing and loads no weights.

    Raises:
        ValueError: `run` would refuse the experiment, its data, its tokenizer or its model's files.
    """
    return prepare(experiment)[0]


def prepare(
    experiment: Experiment,
    tell: Callable[[str], None] = lambda sentence: None,
    waiting: Callable[[str], None] = lambda sentence: None,
) -> tuple[Plan, ReadRows]:
    """The plan and the rows, checked in this order: tracking URI, grid, data, tokenizer, lengths, model, weight files.

    tell: receives sentences about the rows, once nothing is refused. waiting: receives a sentence if reading them takes
    long.

    Raises:
        ValueError: see `dry_run`.
    """
    default_tracking_uri(experiment.storage.path, experiment.tracking.uri)  # refuses what MLflow could not open
    rows = read_rows(expand(experiment), waiting)
    the_plan = plan(experiment, rows.planned)
    for model in dict.fromkeys(trial.model for trial in the_plan.trials):
        check_weights(model)
    for sentence in sentences_about(rows.planned):
        tell(sentence)
    return the_plan, rows
