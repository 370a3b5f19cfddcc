"""The `Experiment`: the contents of a file, checked as a whole. All defaults are defined here and in the sections."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from loragrid.config.checks import problems_across_sections
from loragrid.config.data_section import DataConfig
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
    hyperparameter_types,
)
from loragrid.config.sections import (
    HOLDING_KEYS,
    MEMBER_TRAINING_KEYS,
    METHOD_TRAINING_KEYS,
    OBSERVATION_KEYS,
    ModelConfig,
    TrainingConfig,
)
from loragrid.schema.errors import ExperimentError, Problem
from loragrid.schema.fields import Allowed, Section
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
        problems = problems_across_sections(self)
        if problems:
            raise ExperimentError(problems)
        return self

    def takes_axis(self, block: MethodConfig, axis: str) -> bool:
        """Whether a top-level axis applies to a method: the method has the field and does not set it itself."""
        section, _, field = axis.partition(".")
        own = field in block.settings or field in block.grid
        if section == "method":
            return field in hyperparameter_types(block.name) and not own
        return not (section == "training" and own)
