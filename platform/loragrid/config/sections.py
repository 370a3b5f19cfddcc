"""The sections of an experiment file, with their defaults, except `task:` and the methods' own keys."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from loragrid.schema.errors import ExperimentError, Problem
from loragrid.schema.fields import (
    MAX_COUNT,
    Allowed,
    Count,
    CountOrZero,
    Decay,
    NotNegative,
    OptionalCount,
    OptionalCountOrZero,
    OptionalPositive,
    OptionalText,
    Positive,
    Revision,
    Section,
    Switch,
    Text,
    Unit,
)

CANONICAL_COLUMNS = ("prompt", "completion", "messages", "text")


class ModelConfig(Section):
    """The base model that every trial adapts."""

    name: Text = Field(
        description="Base model: an embedded name, a local folder, or a hub id.",
        examples=["smollm2-135m-instruct", "models/my-base", "meta-llama/Llama-3.2-1B"],
    )
    revision: Revision = Field(
        default=None,
        description="Commit, tag or branch of a hub model; null uses its default branch.",
        examples=["main"],
    )
    dtype: Annotated[Literal["bfloat16", "float32", "float64"], Allowed("bfloat16, float32, float64")] = Field(
        default="bfloat16",
        description="Type of the frozen base weights; adapters are trained in float32 or wider.",
        examples=["float32"],
    )
    trust_remote_code: Switch = Field(
        default=False,
        description="Whether Python code that comes with a hub model may run on this machine.",
        examples=[True],
    )


class DataConfig(Section):
    """The rows that train, evaluate and test every trial; no row is in two of the three splits."""

    name: Text = Field(
        description="Source of the rows: an embedded name, a local .jsonl, .csv or .parquet file, or a hub id.",
        examples=["chitchat", "my_rows.jsonl", "openai/gsm8k"],
    )
    revision: Revision = Field(
        default=None,
        description="Commit, tag or branch of a hub data set; null uses its default branch.",
        examples=["main"],
    )
    subset: OptionalText = Field(
        default=None, description="Configuration name of a hub data set; null uses its default.", examples=["socratic"]
    )
    split: Text = Field(default="train", description="Split of a hub data set with the train rows.", examples=["train"])
    eval_name: OptionalText = Field(
        default=None,
        description="Local file with the evaluation rows; null uses `eval_split` or a part of the train rows.",
        examples=["my_eval_rows.jsonl"],
    )
    eval_split: OptionalText = Field(
        default=None,
        description="Split of the data set with the evaluation rows; null uses a part of the train rows.",
        examples=["validation"],
    )
    test_name: OptionalText = Field(
        default=None,
        description="Local file with the test rows; null uses `test_split` or a part of the train rows.",
        examples=["my_test_rows.jsonl"],
    )
    test_split: OptionalText = Field(
        default=None,
        description="Split of the data set with the test rows; null uses a part of the train rows.",
        examples=["test"],
    )
    forgetting_name: OptionalText = Field(
        default=None,
        description="Local .txt file, or data file with a column `text`, of held-out plain text whose loss is recorded "
        "before and after training; null records none.",
        examples=["encyclopedia.txt"],
    )
    num_forgetting: Annotated[OptionalCount, Unit("pieces of max_length tokens")] = Field(
        default=None, description="Number of leading pieces of the held-out text to use; null uses all.", examples=[64]
    )
    columns: Annotated[
        dict[str, Text], Allowed(f"a mapping from {', '.join(CANONICAL_COLUMNS)} to the data's column names")
    ] = Field(
        default={},
        description="Canonical column (prompt, completion, messages, text) -> name of the column in the data.",
        examples=[{"prompt": "question", "completion": "answer"}],
    )
    max_length: Annotated[
        int, Field(strict=True, ge=2, le=MAX_COUNT), Allowed("a whole number of tokens from 2 on"), Unit("tokens")
    ] = Field(default=512, description="Longest row; longer rows are skipped and counted.", examples=[1024])
    num_train: Annotated[OptionalCount, Unit("rows")] = Field(
        default=None, description="Number of train rows; null uses all that are left.", examples=[5000]
    )
    num_eval: Annotated[Count, Unit("rows")] = Field(
        default=64, description="Number of evaluation rows, on which settings are chosen.", examples=[256]
    )
    num_test: Annotated[CountOrZero, Unit("rows")] = Field(
        default=0, description="Number of test rows, which are scored once, after the last step.", examples=[512]
    )
    loss_on: Annotated[Literal["completion", "all"], Allowed("completion, all")] = Field(
        default="completion",
        description="Tokens that count in the loss: the completion (of a chat, the assistant's turns), or all.",
        examples=["all"],
    )

    @model_validator(mode="after")
    def _check_columns_and_eval_rows(self) -> "DataConfig":
        problems = [
            Problem(
                key=f"columns.{key}",
                value=self.columns[key],
                what="unknown column",
                allowed=", ".join(CANONICAL_COLUMNS),
            )
            for key in self.columns
            if key not in CANONICAL_COLUMNS
        ]
        for rows in ("eval", "test"):
            name, split = getattr(self, f"{rows}_name"), getattr(self, f"{rows}_split")
            if name is not None and split is not None:
                what = f"the {rows} rows already come from {rows}_name ({name})"
                problems.append(Problem(key=f"{rows}_split", value=split, what=what, allowed="one of the two"))
        for key in ("test_name", "test_split"):
            if getattr(self, key) is not None and self.num_test == 0:
                what, allowed = "no test row is taken from it", "num_test set to a whole number from 1 on, or null here"
                problems.append(Problem(key=key, value=getattr(self, key), what=what, allowed=allowed))
        if self.forgetting_name is None and self.num_forgetting is not None:
            what, allowed = "no text is read", "forgetting_name set, or null here"
            problems.append(Problem(key="num_forgetting", value=self.num_forgetting, what=what, allowed=allowed))
        if problems:
            raise ExperimentError(problems)
        return self


class TrainingConfig(Section):
    """How every trial trains; the keys in MEMBER_TRAINING_KEYS can differ between the trials of one pack."""

    steps: Annotated[Count, Unit("optimizer steps")] = Field(
        description="Length of the training of one trial.", examples=[500]
    )
    batch_size: Annotated[Count, Unit("rows")] = Field(
        default=8, description="Rows per optimizer step of one trial, over all workers.", examples=[16]
    )
    lr: Positive = Field(default=1e-3, description="Learning rate at the top of the schedule.", examples=[2e-4])
    schedule: Annotated[Literal["constant", "linear", "cosine"], Allowed("constant, linear, cosine")] = Field(
        default="cosine", description="Course of the learning rate after the warm-up.", examples=["linear"]
    )
    warmup_steps: Annotated[CountOrZero, Unit("optimizer steps")] = Field(
        default=0, description="Steps in which the learning rate rises linearly to `lr`.", examples=[20]
    )
    weight_decay: NotNegative = Field(
        default=0.0, description="Decoupled weight decay of AdamW, per unit of learning rate.", examples=[0.01]
    )
    clip_norm: OptionalPositive = Field(
        default=1.0, description="Largest gradient norm of a trial; null never clips.", examples=[0.3]
    )
    beta1: Decay = Field(default=0.9, description="Decay of AdamW's first moment, per step.", examples=[0.9])
    beta2: Decay = Field(default=0.999, description="Decay of AdamW's second moment, per step.", examples=[0.95])
    epsilon: Positive = Field(default=1e-8, description="Constant in AdamW's denominator.", examples=[1e-6])
    micro_batch_size: Annotated[OptionalCount, Unit("rows")] = Field(
        default=None,
        description="Rows of each trial that a worker holds at once, summing gradients over the step; null holds all.",
        examples=[2],
    )
    activation_checkpointing: Switch = Field(
        default=False,
        description="Whether to keep only the input of every layer and recompute the rest in the backward pass: less "
        "memory, slower steps.",
        examples=[True],
    )
    eval_every: Annotated[OptionalCount, Unit("optimizer steps")] = Field(
        default=None,
        description="Steps between two evaluations; null evaluates only before the first and after the last step.",
        examples=[50],
    )
    report_every: Annotated[OptionalCount, Unit("optimizer steps")] = Field(
        default=None, description="Steps between two reports; null makes about 50 reports.", examples=[10]
    )
    checkpoint_every: Annotated[OptionalCount, Unit("optimizer steps")] = Field(
        default=None, description="Steps between two checkpoints; null keeps only the last.", examples=[100]
    )
    loss_threshold: Annotated[OptionalPositive, Unit("nats per token")] = Field(
        default=None,
        description="Evaluation loss whose first crossing is recorded, in steps and seconds; null records none.",
        examples=[1.5],
    )
    check_every: Annotated[OptionalCountOrZero, Unit("optimizer steps")] = Field(
        default=100,
        description="Steps between two checks of the invariants (trainable set, frozen bits, activation bytes), beside "
        "those after the first and the last step; null checks only these two, 0 never checks.",
        examples=[500],
    )
    measure_steps: Annotated[CountOrZero, Unit("optimizer steps")] = Field(
        default=3,
        description="Steps that each distinct method shape runs in a pack of one to measure memory and speed; 0 "
        "measures nothing.",
        examples=[10],
    )

    @model_validator(mode="after")
    def _check_warmup(self) -> "TrainingConfig":
        if self.warmup_steps > self.steps:
            what = f"longer than the training of {self.steps} steps"
            allowed = f"a whole number from 0 to {self.steps}"
            raise ExperimentError([Problem(key="warmup_steps", value=self.warmup_steps, what=what, allowed=allowed)])
        return self

    def rows_at_once(self, num_workers: int) -> int:
        """The rows of one trial that each worker holds at once: a micro batch, or its whole share of the batch."""
        return self.micro_batch_size or self.rows_per_worker(num_workers)

    def rows_per_worker(self, num_workers: int) -> int:
        """The rows of one trial that each worker trains on in a step."""
        return self.batch_size // num_workers


MEMBER_TRAINING_KEYS = ("lr", "schedule", "warmup_steps", "weight_decay", "clip_norm")
"""Training keys that a method's block may set for itself."""

OBSERVATION_KEYS = frozenset(
    {"eval_every", "report_every", "checkpoint_every", "check_every", "loss_threshold", "measure_steps"}
)
"""Training keys that decide what is observed, not what is trained; not in a trial's identity, never axes."""

HOLDING_KEYS = frozenset({"micro_batch_size"})
"""Training keys that decide how many rows a step holds at once; not in a trial's identity, never axes.

Like the number of workers, they change only rounding and, with dropout, the random draws.
"""


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
    """Trials that fall behind end early: at every rung, only one in `reduction_factor` trials continues.

    The first rung is at `grace_steps`; each further rung has `reduction_factor` times as many steps. Trials that can
    share a base are compared with the trials of the same workers. With `pack.max_members: 1`, and for methods that
    write the base, Tune's ASHA compares every trial with all others of the sweep.
    """

    kind: Annotated[Literal["successive_halving"], Allowed("successive_halving")] = Field(
        default="successive_halving", description="Algorithm that stops trials.", examples=["successive_halving"]
    )
    metric: Annotated[Literal["eval/loss", "train/loss"], Allowed("eval/loss, train/loss")] = Field(
        default="eval/loss",
        description="Metric that compares trials; lower is better.",
        examples=["train/loss"],
    )
    grace_steps: Annotated[Count, Unit("optimizer steps")] = Field(
        description="Steps that every trial trains before the first comparison.", examples=[50]
    )
    reduction_factor: Annotated[int, Field(strict=True, ge=2, le=1000), Allowed("a whole number from 2 to 1000")] = (
        Field(
            default=3,
            description="One in this many trials continues at each rung; also the ratio between two rungs' steps.",
            examples=[4],
        )
    )


class TrackingConfig(Section):
    """Where MLflow keeps the record."""

    uri: OptionalText = Field(
        default=None,
        description="MLflow tracking URI; null uses MLFLOW_TRACKING_URI, otherwise an SQLite file under "
        "`storage.path`.",
        examples=["http://mlflow:5000"],
    )


class StorageConfig(Section):
    """Where trial states, plots and the default MLflow store are kept."""

    path: Text = Field(
        default="loragrid-store",
        description="Folder or URI of half-trained trials, plots and the default MLflow store.",
        examples=["loragrid-store", "s3://bucket/path"],
    )
