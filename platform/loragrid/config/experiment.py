"""The `Experiment`: the contents of a file, checked as a whole. All defaults are defined here and in the sections."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loragrid.config.execution import (
    EarlyStoppingConfig,
    EngineConfig,
    PackConfig,
    SamplesConfig,
    StorageConfig,
    TrackingConfig,
    WorkersConfig,
)
from loragrid.config.judgement import ConfirmConfig, VerdictConfig
from loragrid.config.method_settings import (
    AxisValue,
    AxisValues,
    check_axis_shape,
    check_method_block,
    check_value,
    hyperparameter_types,
    label_problems,
    section_axis_types,
    sharding_obstacle,
)
from loragrid.config.sections import (
    HOLDING_KEYS,
    MEMBER_TRAINING_KEYS,
    METHOD_TRAINING_KEYS,
    OBSERVATION_KEYS,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from loragrid.config.task import task_problems
from loragrid.schema.errors import ExperimentError, Problem, show_value, unknown
from loragrid.schema.fields import MAX_SEED, Allowed, Section
from loragrid.tasks.contract import TaskConfig
from loragrid.tasks.discovery import AnyTask

if TYPE_CHECKING:
    Axis = Sequence[Any] | Mapping[str, Any]
    """An axis as it is written: its values, or a ladder."""

__all__ = [
    "HOLDING_KEYS",
    "MEMBER_TRAINING_KEYS",
    "METHOD_TRAINING_KEYS",
    "OBSERVATION_KEYS",
    "ConfirmConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "EngineConfig",
    "Experiment",
    "ExperimentError",
    "MethodConfig",
    "ModelConfig",
    "PackConfig",
    "SamplesConfig",
    "StorageConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainingConfig",
    "VerdictConfig",
    "WorkersConfig",
]


class MethodConfig(Section):
    """One method of an experiment with its own settings and axes.

    Every other key is a hyperparameter of the method or one of METHOD_TRAINING_KEYS.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="Name of the method; `loragrid methods` lists all.", examples=["lora"])
    label: str | None = Field(
        default=None,
        description="Name of the method in the comparison, by default `name`; blocks of a method that share "
        "a label are tuned together.",
        examples=["LoRA (alpha x 3)"],
    )
    grid: dict[str, AxisValues] = Field(
        default_factory=dict,
        description="Axes of this method: setting -> list of values, or a ladder.",
        examples=[{"rank": [4, 16], "lr": {"ladder": [1e-4, 1e-2], "points": 5}}],
    )

    if TYPE_CHECKING:  # the settings are checked below, when the method is known

        def __init__(
            self, *, name: str, label: str | None = None, grid: Mapping[str, Axis] = ..., **settings: Any
        ) -> None: ...

    @property
    def settings(self) -> dict[str, Any]:
        """Key -> value of the hyperparameters and training keys that the block sets."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _check_block(cls, block: Any) -> Any:
        if isinstance(block, cls):  # built in Python, so already checked
            return block
        if isinstance(block, str):
            block = {"name": block}
        if not isinstance(block, Mapping):
            allowed = "a method's name, or a mapping with the key name"
            raise ExperimentError([Problem(key="", value=block, what="is not a method", allowed=allowed)])
        return check_method_block(block)


class Experiment(Section):
    """One question, the trials that answer it, and where they run and are recorded."""

    name: Annotated[
        str,
        Field(strict=True, max_length=100, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"),
        Allowed("letters, digits, '.', '_' and '-', at most 100, beginning with a letter, a digit or '_'"),
    ] = Field(description="Name of the experiment, also in MLflow.", examples=["quickstart"])
    question: Annotated[
        str,
        Field(strict=True, max_length=2000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]*$"),
        Allowed("at most 2000 characters"),
    ] = Field(
        default="",
        description="The question that the experiment answers, shown in its reports.",
        examples=["Which method learns chit-chat replies best at equal rank?"],
    )
    model: ModelConfig = Field(description="The base model that every trial adapts.")
    data: DataConfig = Field(description="The rows that train, evaluate and test every trial.")
    training: TrainingConfig = Field(description="How every trial trains.")
    methods: Annotated[tuple[MethodConfig, ...], Field(min_length=1), Allowed("a list of at least one method")] = Field(
        description="The methods to compare: names, or mappings with the key `name` and settings.",
        examples=[["lora", {"name": "vera", "grid": {"rank": [64, 256]}}]],
    )
    grid: dict[str, AxisValues] = Field(
        default_factory=dict,
        description="Axes of all methods: `seed`, `model.X`, `data.X`, `training.X`, or `method.X` for every method "
        "that has X and does not set it itself -> list of values, or a ladder.",
        examples=[{"seed": [0, 1, 2], "training.lr": {"ladder": [1e-4, 1e-2], "points": 5}}],
    )
    workers: WorkersConfig = Field(default=WorkersConfig(), description="The processes that train one pack.")
    pack: PackConfig = Field(default=PackConfig(), description="How many trials may share one copy of the base.")
    engine: EngineConfig = Field(default=EngineConfig(), description="How the steps of a pack run on a GPU.")
    early_stopping: EarlyStoppingConfig | None = Field(
        default=None, description="When settings that fall behind end early; null trains every trial to its last step."
    )
    confirm: ConfirmConfig | None = Field(
        default=None,
        description="How each method's chosen setting is trained again with fresh seeds, on which the verdict rests; "
        "null judges the settings by the seeds that chose them.",
    )
    task: AnyTask | None = Field(
        default=None, description="What is scored in addition to the loss; null scores only the loss."
    )
    samples: SamplesConfig = Field(
        default=SamplesConfig(), description="Prompts whose answers the report shows beside the references."
    )
    verdict: VerdictConfig = Field(default=VerdictConfig(), description="How methods are compared.")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="Where MLflow keeps the record.")
    storage: StorageConfig = Field(
        default=StorageConfig(), description="Where trial states, plots and the default MLflow store are kept."
    )

    if TYPE_CHECKING:  # types that pydantic converts to the fields' types

        def __init__(
            self,
            *,
            name: str,
            question: str = ...,
            model: ModelConfig | Mapping[str, Any],
            data: DataConfig | Mapping[str, Any],
            training: TrainingConfig | Mapping[str, Any],
            methods: Sequence[MethodConfig | Mapping[str, Any] | str],
            grid: Mapping[str, Axis] = ...,
            workers: WorkersConfig | Mapping[str, Any] = ...,
            pack: PackConfig | Mapping[str, Any] = ...,
            engine: EngineConfig | Mapping[str, Any] = ...,
            early_stopping: EarlyStoppingConfig | Mapping[str, Any] | None = ...,
            confirm: ConfirmConfig | Mapping[str, Any] | None = ...,
            task: TaskConfig | Mapping[str, Any] | None = ...,
            samples: SamplesConfig | Mapping[str, Any] = ...,
            verdict: VerdictConfig | Mapping[str, Any] = ...,
            tracking: TrackingConfig | Mapping[str, Any] = ...,
            storage: StorageConfig | Mapping[str, Any] = ...,
        ) -> None: ...

    @field_validator("grid", mode="before")
    @classmethod
    def _check_shape_of_grid(cls, grid: Any) -> dict[str, tuple[AxisValue, ...]]:
        if not isinstance(grid, Mapping):
            raise ExperimentError([Problem(key="", value=grid, what="is not a mapping", allowed="axis: [values]")])
        axes: dict[str, tuple[AxisValue, ...]] = {}
        problems: list[Problem] = []
        for key, values in grid.items():
            try:
                axes[key] = check_axis_shape(key, values)
            except ExperimentError as error:
                problems += error.problems
        if problems:
            raise ExperimentError(problems)
        return axes

    @model_validator(mode="after")
    def _check_across_sections(self) -> "Experiment":
        problems = [problem for axis, values in self.grid.items() for problem in self._axis_problems(axis, values)]
        problems += label_problems([(block.name, block.label) for block in self.methods])
        problems += self._verdict_problems()
        num_workers = self.workers.num_workers
        for size in self._batch_sizes():
            problems += sharing_problems(size, self.training.micro_batch_size, num_workers)
        if self.workers.strategy == "shard":
            problems += self._sharding_problems()
        if self.task is not None:
            problems += task_problems(self.data, self.grid)
        grace_steps = self.early_stopping.grace_steps if self.early_stopping else 0
        problems += self._confirm_problems()
        for steps in self.grid.get("training.steps", (self.training.steps,)):
            if isinstance(steps, int) and grace_steps >= steps:
                what = f"no trial of {steps} steps would ever be stopped"
                key, allowed = "early_stopping.grace_steps", f"a whole number from 1 to {steps - 1}"
                problems.append(Problem(key=key, value=grace_steps, what=what, allowed=allowed))
        if problems:
            raise ExperimentError(problems)
        return self

    def _batch_sizes(self) -> list[int]:
        """The batch sizes of all trials; values of a wrong type are reported elsewhere."""
        for_all = self.grid.get("training.batch_size", (self.training.batch_size,))
        sizes: dict[Any, None] = {}
        for block in self.methods:
            own = block.settings.get("batch_size")
            sizes |= dict.fromkeys(block.grid.get("batch_size", for_all) if own is None else (own,))
        return [size for size in sizes if isinstance(size, int)]

    def _confirm_problems(self) -> Iterator[Problem]:
        seeds = [seed for seed in self.grid.get("seed", ()) if isinstance(seed, int)]
        largest = MAX_SEED - (self.confirm.seeds if self.confirm else 0)
        if self.confirm is not None and seeds and max(seeds) > largest:
            what = f"leaves no room for the {self.confirm.seeds} fresh seeds of confirm above the largest seed"
            yield Problem(key="grid.seed", value=list(seeds), what=what, allowed=f"whole numbers from 0 to {largest}")

    def _verdict_problems(self) -> Iterator[Problem]:
        names = list(dict.fromkeys(block.label or block.name for block in self.methods))
        if self.verdict.against is not None and self.verdict.against not in names:
            yield Problem(
                key="verdict.against",
                value=self.verdict.against,
                what="is no method of this experiment",
                allowed=", ".join(names),
            )

    def _sharding_problems(self) -> Iterator[Problem]:
        key, value = "workers.strategy", self.workers.strategy
        if self.workers.num_workers == 1:
            what, allowed = "a sharded base needs several workers", "replicate, or workers.num_workers from 2 on"
            yield Problem(key=key, value=value, what=what, allowed=allowed)
        for name in dict.fromkeys(block.name for block in self.methods):
            if obstacle := sharding_obstacle(name):
                what = f"{name} {obstacle}"
                yield Problem(key=key, value=value, what=what, allowed=f"replicate, or methods without {name}")

    def _axis_problems(self, axis: str, values: Sequence[AxisValue]) -> Iterator[Problem]:
        key, section_types = f"grid.{axis}", section_axis_types()
        section, _, field = axis.partition(".")
        if section == "method":
            yield from self._method_axis_problems(key, field, values)
        elif section == "training" and field in OBSERVATION_KEYS:
            what = "decides what is observed, not the result: it cannot be an axis"
            yield Problem(key=key, value=list(values), what=what, allowed=f"one value, as {axis}")
        elif section == "training" and field in HOLDING_KEYS:
            what = "only decides how many rows a step holds at once: it cannot be an axis"
            yield Problem(key=key, value=list(values), what=what, allowed=f"one value, as {axis}")
        elif axis not in section_types:
            fields = {f"method.{name}" for block in self.methods for name in hyperparameter_types(block.name)}
            yield unknown("axis", axis, [*sorted(fields), *section_types], key=key, value=list(values))
        else:
            for value in values:
                try:
                    check_value(section_types[axis], key, value)
                except ExperimentError as error:
                    yield from error.problems
            if section == "training" and not any(self.takes_axis(block, axis) for block in self.methods):
                yield Problem(
                    key=key, value=list(values), what=f"every method sets its own {field}: the axis has no effect"
                )
            if section != "seed":
                yield from self._fixed_value_problems(axis, values)

    def _method_axis_problems(self, key: str, field: str, values: Sequence[AxisValue]) -> Iterator[Problem]:
        types_of = {block.name: hyperparameter_types(block.name) for block in self.methods}
        having = [name for name, types in types_of.items() if field in types]
        if not having:
            fields = sorted({f"method.{name}" for types in types_of.values() for name in types})
            if field in METHOD_TRAINING_KEYS:
                fields = [f"training.{field}", *fields]
            methods = ", ".join(types_of)
            yield unknown(f"axis: no method here ({methods}) has {field!r}", f"method.{field}", fields, key=key)
            return
        if not any(self.takes_axis(block, f"method.{field}") for block in self.methods):
            what = f"every method that has {field} ({', '.join(having)}) sets its own: the axis has no effect"
            yield Problem(key=key, value=list(values), what=what)
        for value in values:
            for name in having:
                try:
                    check_value(types_of[name][field], key, value)
                except ExperimentError as error:
                    yield from error.problems
                    break

    def _fixed_value_problems(self, axis: str, values: Sequence[AxisValue]) -> Iterator[Problem]:
        """The problem of a section that sets a key to a value outside the axis of that key: it would be ignored."""
        section, _, field = axis.partition(".")
        config: BaseModel = getattr(self, section)
        fixed = getattr(config, field)
        if field in config.model_fields_set and fixed not in values:
            what = f"is not among the values of the axis grid.{axis}"
            allowed = f"{', '.join(show_value(value) for value in values)}, or one of the two left out"
            yield Problem(key=axis, value=fixed, what=what, allowed=allowed)

    def takes_axis(self, block: MethodConfig, axis: str) -> bool:
        """Whether a top-level axis applies to a method: the method has the field and does not set it itself."""
        section, _, field = axis.partition(".")
        own = field in block.settings or field in block.grid
        if section == "method":
            return field in hyperparameter_types(block.name) and not own
        return not (section == "training" and own)


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
