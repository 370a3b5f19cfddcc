"""Checks an experiment across its sections: axes, workers, the family of tests, fresh seeds."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from loragrid.config.execution import EarlyStoppingConfig
from loragrid.config.method_settings import (
    AxisValue,
    check_value,
    hyperparameter_types,
    label_problems,
    section_axis_types,
    sharding_obstacle,
)
from loragrid.config.sections import HOLDING_KEYS, METHOD_TRAINING_KEYS, OBSERVATION_KEYS, TrainingConfig
from loragrid.config.task import task_problems
from loragrid.schema.errors import ExperimentError, Problem, show_value, unknown
from loragrid.schema.fields import MAX_SEED, allowed_by

if TYPE_CHECKING:
    from loragrid.config.experiment import Experiment


def problems_across_sections(experiment: "Experiment") -> list[Problem]:
    """Everything that makes the experiment impossible although each of its sections is valid."""
    problems = [
        problem for axis, values in experiment.grid.items() for problem in _axis_problems(experiment, axis, values)
    ]
    problems += label_problems([(block.name, block.label) for block in experiment.methods])
    problems += _verdict_problems(experiment)
    for size in _batch_sizes(experiment):
        problems += sharing_problems(size, experiment.training.micro_batch_size, experiment.workers.num_workers)
    if experiment.workers.strategy == "shard":
        problems += _sharding_problems(experiment)
    if experiment.task is not None:
        problems += task_problems(experiment.data, experiment.grid)
    problems += _confirm_problems(experiment)
    problems += _length_problems(experiment)
    return [*problems, *_early_stopping_problems(experiment)]


def _length_problems(experiment: "Experiment") -> Iterator[Problem]:
    """The problem of an experiment in which no key and no axis says how long trials train."""
    training = experiment.training
    axes = {"training.steps", "training.epochs"} & experiment.grid.keys()
    if training.steps is None and training.epochs is None and not axes:
        yield missing_length()


def missing_length() -> Problem:
    """The problem of a training without a length."""
    allowed = f"{allowed_by(TrainingConfig.model_fields['steps'].metadata)}; or training.epochs: a number above 0"
    return Problem(key="training.steps", what="is missing", allowed=allowed.replace(", or null", ""))


def _early_stopping_problems(experiment: "Experiment") -> Iterator[Problem]:
    for steps in experiment.grid.get("training.steps", (experiment.training.steps,)):
        if isinstance(steps, int):
            yield from grace_problems(experiment.early_stopping, steps)


def grace_problems(early_stopping: EarlyStoppingConfig | None, steps: int) -> Iterator[Problem]:
    """The problem of an early stopping that would stop no trial of so many steps."""
    if early_stopping is not None and early_stopping.grace_steps >= steps:
        what = f"no trial of {steps} steps would ever be stopped"
        key, allowed = "early_stopping.grace_steps", f"a whole number from 1 to {steps - 1}"
        yield Problem(key=key, value=early_stopping.grace_steps, what=what, allowed=allowed)


def _batch_sizes(experiment: "Experiment") -> list[int]:
    """The batch sizes of all trials; values of a wrong type are reported elsewhere."""
    for_all = experiment.grid.get("training.batch_size", (experiment.training.batch_size,))
    sizes: dict[Any, None] = {}
    for block in experiment.methods:
        own = block.settings.get("batch_size")
        sizes |= dict.fromkeys(block.grid.get("batch_size", for_all) if own is None else (own,))
    return [size for size in sizes if isinstance(size, int)]


def _confirm_problems(experiment: "Experiment") -> Iterator[Problem]:
    seeds = [seed for seed in experiment.grid.get("seed", ()) if isinstance(seed, int)]
    largest = MAX_SEED - (experiment.confirm.seeds if experiment.confirm else 0)
    if experiment.confirm is not None and seeds and max(seeds) > largest:
        what = f"leaves no room for the {experiment.confirm.seeds} fresh seeds of confirm above the largest seed"
        yield Problem(key="grid.seed", value=list(seeds), what=what, allowed=f"whole numbers from 0 to {largest}")


def _verdict_problems(experiment: "Experiment") -> Iterator[Problem]:
    names = list(dict.fromkeys(block.label or block.name for block in experiment.methods))
    if experiment.verdict.against is not None and experiment.verdict.against not in names:
        yield Problem(
            key="verdict.against",
            value=experiment.verdict.against,
            what="is no method of this experiment",
            allowed=", ".join(names),
        )


def _sharding_problems(experiment: "Experiment") -> Iterator[Problem]:
    key, value = "workers.strategy", experiment.workers.strategy
    if experiment.workers.num_workers == 1:
        what, allowed = "a sharded base needs several workers", "replicate, or workers.num_workers from 2 on"
        yield Problem(key=key, value=value, what=what, allowed=allowed)
    for name in dict.fromkeys(block.name for block in experiment.methods):
        if obstacle := sharding_obstacle(name):
            what = f"{name} {obstacle}"
            yield Problem(key=key, value=value, what=what, allowed=f"replicate, or methods without {name}")


def _axis_problems(experiment: "Experiment", axis: str, values: Sequence[AxisValue]) -> Iterator[Problem]:
    key, section_types = f"grid.{axis}", section_axis_types()
    section, _, field = axis.partition(".")
    if section == "method":
        yield from _method_axis_problems(experiment, key, field, values)
    elif section == "training" and field in OBSERVATION_KEYS:
        what = "decides what is observed, not the result: it cannot be an axis"
        yield Problem(key=key, value=list(values), what=what, allowed=f"one value, as {axis}")
    elif section == "training" and field in HOLDING_KEYS:
        what = "only decides how many rows a step holds at once: it cannot be an axis"
        yield Problem(key=key, value=list(values), what=what, allowed=f"one value, as {axis}")
    elif axis not in section_types:
        fields = {f"method.{name}" for block in experiment.methods for name in hyperparameter_types(block.name)}
        yield unknown("axis", axis, [*sorted(fields), *section_types], key=key, value=list(values))
    else:
        for value in values:
            try:
                check_value(section_types[axis], key, value)
            except ExperimentError as error:
                yield from error.problems
        if section == "training" and not any(experiment.takes_axis(block, axis) for block in experiment.methods):
            yield Problem(
                key=key, value=list(values), what=f"every method sets its own {field}: the axis has no effect"
            )
        if section != "seed":
            yield from _fixed_value_problems(experiment, axis, values)


def _method_axis_problems(
    experiment: "Experiment", key: str, field: str, values: Sequence[AxisValue]
) -> Iterator[Problem]:
    types_of = {block.name: hyperparameter_types(block.name) for block in experiment.methods}
    having = [name for name, types in types_of.items() if field in types]
    if not having:
        fields = sorted({f"method.{name}" for types in types_of.values() for name in types})
        if field in METHOD_TRAINING_KEYS:
            fields = [f"training.{field}", *fields]
        methods = ", ".join(types_of)
        yield unknown(f"axis: no method here ({methods}) has {field!r}", f"method.{field}", fields, key=key)
        return
    if not any(experiment.takes_axis(block, f"method.{field}") for block in experiment.methods):
        what = f"every method that has {field} ({', '.join(having)}) sets its own: the axis has no effect"
        yield Problem(key=key, value=list(values), what=what)
    for value in values:
        for name in having:
            try:
                check_value(types_of[name][field], key, value)
            except ExperimentError as error:
                yield from error.problems
                break


def _fixed_value_problems(experiment: "Experiment", axis: str, values: Sequence[AxisValue]) -> Iterator[Problem]:
    """The problem of a section that sets a key to a value outside the axis of that key: it would be ignored."""
    section, _, field = axis.partition(".")
    config: BaseModel = getattr(experiment, section)
    fixed = getattr(config, field)
    if field in config.model_fields_set and fixed not in values:
        what = f"is not among the values of the axis grid.{axis}"
        allowed = f"{', '.join(show_value(value) for value in values)}, or one of the two left out"
        yield Problem(key=axis, value=fixed, what=what, allowed=allowed)


def sharing_problems(batch_size: int, micro_batch_size: int | None, num_workers: int) -> Iterator[Problem]:
    """Why workers cannot share a batch equally, or cannot cut their shares into equal micro batches."""
    share, left = divmod(batch_size, num_workers)
    if left:
        what = f"cannot share the {batch_size} rows of training.batch_size equally"
        yield Problem(key="workers.num_workers", value=num_workers, what=what, allowed=f"a divisor of {batch_size}")
    elif micro_batch_size is not None and share % micro_batch_size:
        what = f"cannot cut the {share} rows of training.batch_size that each worker takes into equal parts"
        allowed = f"a divisor of {share}, or null"
        yield Problem(key="training.micro_batch_size", value=micro_batch_size, what=what, allowed=allowed)
