"""The sections that say how a sweep runs: workers, packs, engine, early stopping, tracking and storage."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from loragrid.config.tracking_uri import check_tracking_uri
from loragrid.schema.errors import ExperimentError, Problem
from loragrid.schema.fields import (
    Allowed,
    Count,
    CountOrZero,
    OptionalCount,
    OptionalPositive,
    OptionalText,
    Section,
    Switch,
    Text,
    Unit,
)


class WorkersConfig(Section):
    """The processes that train one pack."""

    num_workers: Annotated[Count, Unit("processes")] = Field(
        default=1, description="Training processes per pack, each with one GPU where GPUs are used.", examples=[4]
    )
    strategy: Annotated[Literal["replicate", "shard"], Allowed("replicate, shard")] = Field(
        default="replicate",
        description="Whether every worker holds the whole frozen base (replicate) or a share of it (shard).",
        examples=["shard"],
    )
    use_gpu: Annotated[Literal["auto"] | Switch, Allowed("auto, true, false")] = Field(
        default="auto",
        description="Whether workers use GPUs; auto uses those of the cluster.",
        examples=[False],
    )
    cpus_per_worker: Annotated[OptionalPositive, Unit("CPU cores")] = Field(
        default=None, description="Cores reserved for each worker; null derives them from the cluster.", examples=[4.0]
    )
    max_failures: Annotated[CountOrZero, Unit("failures")] = Field(
        default=3,
        description="How often the workers of a pack may die and be replaced before the pack is given up.",
        examples=[0],
    )


class PackConfig(Section):
    """How many trials may share one copy of the base."""

    max_members: Annotated[Literal["auto"] | Count, Allowed("auto, or a whole number from 1 on"), Unit("trials")] = (
        Field(
            default="auto",
            description="Most trials per pack; auto derives it from the tokens per step, 1 trains trials one by one.",
            examples=[8],
        )
    )


class EngineConfig(Section):
    """How the steps of a pack run on a GPU."""

    mode: Annotated[Literal["auto", "eager", "graph", "compiled"], Allowed("auto, eager, graph, compiled")] = Field(
        default="auto",
        description="Eager steps, steps captured as a CUDA graph, or compiled and captured steps; auto takes the mode "
        "that pays off.",
        examples=["eager"],
    )
    deterministic: Switch = Field(
        default=False,
        description="Whether a GPU uses only kernels that repeat to the bit, as a CPU always does: bfloat16 steps are "
        "a few percent slower, and a model that needs another kernel cannot be trained.",
        examples=[True],
    )


class EarlyStoppingConfig(Section):
    """Settings that fall behind end early: at every rung, only one in `reduction_factor` settings continues.

    The first rung is at `grace_steps`; each further rung has `reduction_factor` times as many steps. A setting is
    ranked by the mean of `metric` over its seeds, and all its seeds continue or end together. One setting is always
    left, so with `within: method` every method ends with all seeds of its best setting.
    """

    kind: Annotated[Literal["successive_halving"], Allowed("successive_halving")] = Field(
        default="successive_halving", description="Algorithm that stops settings.", examples=["successive_halving"]
    )
    metric: Annotated[Literal["eval/loss", "train/loss"], Allowed("eval/loss, train/loss")] = Field(
        default="eval/loss",
        description="Metric whose mean over seeds ranks settings; lower is better.",
        examples=["train/loss"],
    )
    within: Annotated[Literal["method", "sweep"], Allowed("method, sweep")] = Field(
        default="method",
        description="Whose settings compete: those of one method (blocks with one label count as one), or those of all "
        "methods, which can leave some methods without a verdict.",
        examples=["sweep"],
    )
    grace_steps: Annotated[Count, Unit("optimizer steps")] = Field(
        description="Steps that every trial trains before the first ranking.", examples=[50]
    )
    reduction_factor: Annotated[int, Field(strict=True, ge=2, le=1000), Allowed("a whole number from 2 to 1000")] = (
        Field(
            default=3,
            description="One in this many settings continues at each rung, at least one; also the ratio between two "
            "rungs' steps.",
            examples=[4],
        )
    )


class SamplesConfig(Section):
    """The answers to a few prompts that every finished trial writes, and the base before them."""

    num_prompts: Annotated[CountOrZero, Unit("prompts")] = Field(
        default=5,
        description="Number of test rows (without test rows, evaluation rows) whose prompts are answered, each of "
        "another group; 0 answers none.",
        examples=[10],
    )
    max_new_tokens: Annotated[OptionalCount, Unit("tokens")] = Field(
        default=None,
        description="Longest answer; null takes `task.max_new_tokens` of a task that generates, otherwise twice the "
        "longest of their references, from 16 to 64. The model's context limits it, too.",
        examples=[64],
    )


class TrackingConfig(Section):
    """Where MLflow keeps the record."""

    uri: OptionalText = Field(
        default=None,
        description="MLflow tracking URI; null uses MLFLOW_TRACKING_URI, otherwise an SQLite file under "
        "`storage.path`.",
        examples=["http://mlflow:5000"],
    )

    @model_validator(mode="after")
    def _check_uri(self) -> "TrackingConfig":
        try:
            if self.uri is not None:
                check_tracking_uri("uri", self.uri)
        except ValueError as error:
            raise ExperimentError([Problem(key="uri", what=str(error).removeprefix("uri: "))]) from None
        return self


class StorageConfig(Section):
    """Where trial states, plots and the default MLflow store are kept."""

    path: Text = Field(
        default="loragrid-store",
        description="Folder or URI of half-trained trials, plots and the default MLflow store.",
        examples=["loragrid-store", "s3://bucket/path"],
    )
