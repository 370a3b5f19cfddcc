"""Loads an experiment file or mapping and refuses grids that cannot be expanded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loragrid.config.experiment import Experiment
from loragrid.config.overrides import apply_override
from loragrid.config.yaml_reader import read_yaml
from loragrid.schema.errors import ExperimentError, Problem, problems_of


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in a YAML file, with `key.path=value` overrides; values are read as YAML.

    Raises ExperimentError, which names file, key, value and what is allowed, for an experiment that cannot run.
    """
    return experiment_from_mapping(read_yaml(Path(path)), str(path), overrides)


def experiment_from_mapping(mapping: Any, source: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment that a mapping describes; errors name `source`. Raises ExperimentError as `load_experiment`."""
    if not isinstance(mapping, Mapping):
        allowed = "keys such as name, model, data, training, methods"
        raise ExperimentError([Problem(key="", value=mapping, what="is not an experiment", allowed=allowed)], source)
    overridden: list[str] = []
    for override in overrides:
        mapping, keys = apply_override(mapping, override)
        overridden += keys
    try:
        experiment = Experiment.model_validate(mapping)
        # This imports the methods and, with them, torch; a file that is refused above does not need them.
        from loragrid.trials.expand import expand

        expand(experiment)  # reports the grid's problems with the file's name
    except ValidationError as error:
        raise ExperimentError(problems_of(error, Experiment), source, overridden) from None
    except ExperimentError as error:
        raise ExperimentError(error.problems, source, overridden) from None
    return experiment
