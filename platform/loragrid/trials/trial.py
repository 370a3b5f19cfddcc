"""One grid point: everything that decides a result, and its id."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from loragrid.config.data_section import DataConfig
from loragrid.config.method_settings import Scalar
from loragrid.config.sections import HOLDING_KEYS, OBSERVATION_KEYS, ModelConfig, TrainingConfig
from loragrid.schema.fields import Section
from loragrid.tasks.contract import TASK_OBSERVATION_KEYS, TaskConfig
from loragrid_methods import Method

DIGEST_LENGTH = 8
ADDED_KEYS: dict[str, tuple[str, ...]] = {
    "data": ("group_by", "shape", "turns", "chat_template", "on_bad_row"),
    "training": ("epochs", "warmup_ratio"),
}
"""Section -> keys that are part of a trial's id only if they differ from their default: ids are older than they are."""

ADDED_METHOD_KEYS = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Hyperparameters that are part of a trial's id and of its record only if they are set, for the same reason."""

Phase = Literal["tune", "confirm"]
"""`tune`: a trial of the grid, which helps to choose a setting. `confirm`: a chosen setting with a fresh seed."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One grid point: a method with its hyperparameters, a seed, and everything else that decides its result."""

    trial_id: str
    method: Method
    seed: int
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    label: str = ""
    """The method's name in comparisons; "": its own name. Not part of the trial's identity."""
    task: TaskConfig | None = None
    phase: Phase = "tune"
    """Not part of the trial's identity, which its seed already tells apart from every trial of the other phase."""
    found: Mapping[str, Scalar] = dataclasses.field(default_factory=dict, compare=False)
    """Dotted key that the experiment leaves open -> the value that is used, once the rows are known: `training.steps`
    of a training in epochs, `data.num_train` if it is null. They are recorded as the trial's parameters."""
    written: Mapping[str, Scalar] = dataclasses.field(default_factory=dict, compare=False)
    """Dotted key -> value from which `found` was computed, such as `training.epochs`; recorded too."""
    asked_id: str = dataclasses.field(default="", compare=False)
    """The id before the rows were known, if its length is in epochs: other rows would give it another `trial_id`."""

    @property
    def run_name(self) -> str:
        """The name of its MLflow run: the trial id, with the label instead of the method's name."""
        return (self.label or self.method.name) + self.trial_id.removeprefix(self.method.name)

    @property
    def setting_id(self) -> str:
        """The id of its setting: equal for trials that differ only in their seed."""
        return _identify(self.method, None, self.model, self.data, self.training, self.task)

    def with_seed(self, seed: int, phase: Phase) -> "Trial":
        """The trial of the same setting with another seed."""
        trial_id = make_trial_id(self.method, seed, self.model, self.data, self.training, self.task)
        return replace(self, trial_id=trial_id, seed=seed, phase=phase, asked_id="")

    def parameters(self) -> dict[str, Scalar]:
        """Dotted YAML path -> value of everything that defines the trial, flat, as MLflow records it."""
        own = _parameters(self.method, self.seed, self.model, self.data, self.training, self.task)
        return own | {**self.written, **self.found}


def make_trial_id(
    method: Method, seed: int, model: ModelConfig, data: DataConfig, training: TrainingConfig, task: TaskConfig | None
) -> str:
    """The method's name and a digest of every field that changes the result, so that a trial always has the same id.

    The task is part of the digest, because it changes the trial's figures, although it changes no weight.
    """
    return _identify(method, seed, model, data, training, task)


def _identify(
    method: Method,
    seed: int | None,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
    task: TaskConfig | None,
) -> str:
    content: dict[str, Any] = {
        "method": {"name": method.name, **_set_hyperparameters(method)},
        "seed": seed,
        "model": model.model_dump(),
        "data": data.model_dump(exclude=_at_default("data", data)),
        "training": training.model_dump(exclude={*OBSERVATION_KEYS, *HOLDING_KEYS, *_at_default("training", training)}),
    }
    if task is not None:
        content["task"] = task.model_dump(exclude=set(TASK_OBSERVATION_KEYS))
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGEST_LENGTH]
    return f"{method.name}-{digest}"


def _at_default(name: str, section: Section) -> set[str]:
    """The added keys of a section that have their defaults."""
    defaults = type(section).model_fields
    return {key for key in ADDED_KEYS[name] if getattr(section, key) == defaults[key].default}


def _set_hyperparameters(method: Method) -> dict[str, Any]:
    values = method.hyperparameters()
    return {key: value for key, value in values.items() if value is not None or key not in ADDED_METHOD_KEYS}


def _parameters(
    method: Method, seed: int, model: ModelConfig, data: DataConfig, training: TrainingConfig, task: TaskConfig | None
) -> dict[str, Scalar]:
    parameters: dict[str, Scalar] = {"method.name": method.name}
    for field, value in _set_hyperparameters(method).items():
        parameters[f"method.{field}"] = ",".join(map(str, value)) if isinstance(value, tuple) else value
    parameters["seed"] = seed
    for section, config in (("model", model), ("data", data), ("training", training)):
        for field, value in config.model_dump().items():
            if isinstance(value, dict):
                parameters |= {f"{section}.{field}.{key}": text for key, text in sorted(value.items())}
            else:
                parameters[f"{section}.{field}"] = value
    if task is not None:
        parameters |= {f"task.{key}": value for key, value in task.parameters().items()}
    return parameters
