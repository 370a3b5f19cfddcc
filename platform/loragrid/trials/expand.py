"""Expands an experiment into its trials: every combination of the axes of each method."""

import itertools
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from loragrid.config.checks import missing_length, sharing_problems
from loragrid.config.experiment import Experiment, MethodConfig
from loragrid.config.method_settings import (
    AXIS_SECTIONS,
    MAX_TRIALS,
    AxisValue,
    check_value,
    hyperparameter_types,
    section_axis_types,
)
from loragrid.config.sections import METHOD_TRAINING_KEYS
from loragrid.schema.errors import ExperimentError, Problem, problems_of, show_value, unknown
from loragrid.schema.fields import Section
from loragrid.trials.trial import Trial, make_trial_id
from loragrid_methods import Method, get_method

DEFAULT_SEED = 0


def expand(experiment: Experiment) -> list[Trial]:
    """Every trial of the experiment: methods in the file's order, then their axes in the file's order, seeds last.

    Raises ExperimentError if a combination is impossible, two trials are equal, or there are too many.
    """
    grids = [_axes_of(experiment, block) for block in experiment.methods]
    num_trials = sum(math.prod(len(values) for values in axes.values()) for axes in grids)
    if num_trials > MAX_TRIALS:
        what = f"the axes make {num_trials} trials"
        raise ExperimentError([Problem(key="grid", what=what, allowed=f"at most {MAX_TRIALS}")])
    trials: dict[str, Trial] = {}
    origins: dict[str, str] = {}
    for place, (block, axes) in enumerate(zip(experiment.methods, grids, strict=True)):
        for values in _combinations(axes):
            try:
                trial = _build_trial(experiment, place, values)
            except ExperimentError as error:
                problems = [replace(problem, key=_key_in_file(problem.key, block, place)) for problem in error.problems]
                raise ExperimentError(problems) from None
            origin = f"{block.name} at {_show_axes(values)}"
            if trial.trial_id in trials:
                what = f"{origin} is the same trial as {origins[trial.trial_id]}"
                raise ExperimentError([Problem(key=f"methods.{place}", what=what, allowed="every trial once")])
            trials[trial.trial_id], origins[trial.trial_id] = trial, f"methods.{place} ({origin})"
    return list(trials.values())


def trial_from_axes(experiment: Experiment, axes: Mapping[str, Any]) -> Trial:
    """The one trial of an experiment at the given point, for sweeps that another program drives.

    axes: `method.name` (needed only if the experiment has several methods), `method.X`, `model.X`, `data.X`,
    `training.X`, `seed` -> value; they override the experiment. An axis of the experiment that is not given must have a
    single value.

    Raises ExperimentError for an unknown axis, an impossible value, or a point that is not a single trial.
    """
    values = {axis: _plain(value) for axis, value in axes.items()}
    place = _place_of_method(experiment, values.pop("method.name", None))
    block = experiment.methods[place]
    types = {f"method.{field}": kind for field, kind in hyperparameter_types(block.name).items()} | section_axis_types()
    problems = [
        unknown(f"axis of {block.name}", axis, ["method.name", *types], key=axis, value=value)
        for axis, value in values.items()
        if axis not in types
    ]
    own_axes = _axes_of(experiment, block)
    problems += [
        Problem(key=axis, what="is an axis of the experiment and has no value here", allowed=_show_values(choices))
        for axis, choices in own_axes.items()
        if len(choices) > 1 and axis not in values
    ]
    if problems:
        raise ExperimentError(problems)
    point = {axis: choices[0] for axis, choices in own_axes.items()} | values
    trial = _build_trial(experiment, place, {axis: check_value(types[axis], axis, point[axis]) for axis in point})
    training = trial.training
    num_workers = experiment.workers.num_workers
    if problems := list(sharing_problems(training.batch_size, training.micro_batch_size, num_workers)):
        raise ExperimentError(problems)
    return trial


def _place_of_method(experiment: Experiment, name: object) -> int:
    names = [block.name for block in experiment.methods]
    places = [place for place, known in enumerate(names) if name in (None, known)]
    if not places:
        raise ExperimentError([unknown("method of this experiment", name, names, key="method.name", value=name)])
    if len(places) > 1:
        what = f"{len(places)} blocks of the experiment could be meant"
        value = [names[place] for place in places]
        raise ExperimentError([Problem(key="method.name", value=value, what=what, allowed="exactly one")])
    return places[0]


def _axes_of(experiment: Experiment, block: MethodConfig) -> dict[str, tuple[AxisValue, ...]]:
    """Dotted axis -> values for one method: its own axes, then the top-level axes that apply, seed last."""
    axes = {_dotted(key): values for key, values in block.grid.items()}
    axes |= {axis: values for axis, values in experiment.grid.items() if experiment.takes_axis(block, axis)}
    seeds = axes.pop("seed", (DEFAULT_SEED,))
    return axes | {"seed": seeds}


def _dotted(setting: str) -> str:
    return f"training.{setting}" if setting in METHOD_TRAINING_KEYS else f"method.{setting}"


def _combinations(axes: Mapping[str, tuple[AxisValue, ...]]) -> Iterator[dict[str, AxisValue]]:
    for point in itertools.product(*axes.values()):
        yield dict(zip(axes, point, strict=True))


def _build_trial(experiment: Experiment, place: int, axes: Mapping[str, Any]) -> Trial:
    """The trial at one point; errors name values by their axes."""
    block = experiment.methods[place]
    values = {_dotted(setting): value for setting, value in block.settings.items()} | dict(axes)
    method = _build_method(block.name, _below("method", values))
    sections: dict[str, Any] = {
        section: _changed(getattr(experiment, section), _below(section, values), section) for section in AXIS_SECTIONS
    }
    if sections["training"].steps is None and sections["training"].epochs is None:
        raise ExperimentError([missing_length()])
    if sections["training"].steps is not None:
        try:
            method.check_steps(sections["training"].steps)
        except ValueError as error:
            raise ExperimentError([Problem(key=f"methods.{place}", what=str(error))]) from None
    seed = values["seed"]
    sections["task"] = experiment.task
    trial_id = make_trial_id(method, seed, **sections)
    return Trial(trial_id=trial_id, method=method, seed=seed, **sections, label=block.label or "")


def _key_in_file(axis: str, block: MethodConfig, place: int) -> str:
    """The key of the experiment file from which an axis has its value, such as `methods.0.grid.rank`."""
    setting = axis.rpartition(".")[2]
    if axis == _dotted(setting):
        if setting in block.settings:
            return f"methods.{place}.{setting}"
        if setting in block.grid:
            return f"methods.{place}.grid.{setting}"
    return f"grid.{axis}" if axis.startswith("method.") else axis


def _below(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{section}."
    return {axis.removeprefix(prefix): value for axis, value in values.items() if axis.startswith(prefix)}


def _changed(section: Section, changes: Mapping[str, Any], key: str) -> Section:
    """The section with some fields changed and checked again; the same object if nothing changes."""
    if not changes:
        return section
    try:
        return type(section).model_validate(section.model_dump() | dict(changes))
    except ValidationError as error:
        raise ExperimentError([problem.under(key) for problem in problems_of(error, type(section))]) from None


def _build_method(name: str, settings: Mapping[str, Any]) -> Method:
    types = hyperparameter_types(name)
    checked = {field: check_value(types[field], f"method.{field}", value) for field, value in settings.items()}
    try:
        return get_method(name)(**checked)
    except ValueError as error:
        raise ExperimentError([_method_problem(name, checked, str(error))]) from None


def _method_problem(name: str, settings: Mapping[str, Any], reason: str) -> Problem:
    """The problem of a refused method: the one setting that is refused by itself, otherwise all settings together."""
    for field, value in settings.items():
        try:
            get_method(name)(**{field: value})
        except ValueError as error:
            what = str(error).removeprefix(f"{name}.{field}: {value!r} ")
            return Problem(key=f"method.{field}", value=value, what=what)
    return Problem(key="method", value={"name": name, **settings}, what=reason)


def _plain(value: Any) -> Any:
    """The value as Python's own number; search libraries pass numpy's."""
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _show_axes(values: Mapping[str, AxisValue]) -> str:
    return ", ".join(f"{axis} {show_value(value)}" for axis, value in values.items())


def _show_values(values: tuple[AxisValue, ...]) -> str:
    return ", ".join(show_value(value) for value in values)
