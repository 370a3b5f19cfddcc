"""The sections of an experiment file and their defaults; a field's `description` is what an error says is allowed."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loragrid.config.errors import ExperimentError, Problem

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**32 - 1
CANONICAL_COLUMNS = ("prompt", "completion", "messages", "text")

Text = Annotated[
    str,
    Field(strict=True, min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]*$", description="text on one line"),
]
OptionalText = Annotated[
    str | None,
    Field(
        strict=True,
        min_length=1,
        max_length=1000,
        pattern=r"^[^\x00-\x1f\x7f]*$",
        description="text on one line, or null",
    ),
]
Label = Annotated[
    str | None,
    Field(
        strict=True,
        max_length=40,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_ .+()/=-]*$",
        description="at most 40 letters, digits, spaces and _.+()/=-, beginning with a letter, a digit or _, or null",
    ),
]
Revision = Annotated[
    str | None,
    Field(
        strict=True,
        max_length=200,
        # As git allows them, and never `..`: the hub's cache makes a path of it.
        pattern=r"^[^\x00-\x20\x7f./~^:?*\[\\]+([./][^\x00-\x20\x7f./~^:?*\[\\]+)*$",
        description="text: the name of a commit, tag or branch, or null",
    ),
]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT, description=f"a whole number from 1 to {MAX_COUNT}")]
CountOrZero = Annotated[
    int, Field(strict=True, ge=0, le=MAX_COUNT, description=f"a whole number from 0 to {MAX_COUNT}")
]
OptionalCount = Annotated[
    int | None, Field(strict=True, ge=1, le=MAX_COUNT, description=f"a whole number from 1 to {MAX_COUNT}, or null")
]
OptionalCountOrZero = Annotated[
    int | None, Field(strict=True, ge=0, le=MAX_COUNT, description=f"a whole number from 0 to {MAX_COUNT}, or null")
]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number above 0")]
OptionalPositive = Annotated[
    float | None, Field(strict=True, gt=0, allow_inf_nan=False, description="a number above 0, or null")
]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number of 0 or more")]
Decay = Annotated[
    float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False, description="a number from 0 up to, but not, 1")
]
Switch = Annotated[bool, Field(strict=True, description="true or false")]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED, description=f"a whole number from 0 to {MAX_SEED}")]


class Section(BaseModel):
    """A part of an experiment: cannot be changed once made, refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __hash__(self) -> int:
        # pydantic's own hash fails on fields that are dictionaries; sections group trials into packs.
        return hash(self.model_dump_json())


class ModelConfig(Section):
    """The base that every trial adapts.

    name: embedded name, local folder, or hub id. revision: the hub's commit, tag or branch.
    trust_remote_code: whether code that comes with a hub model may run on this machine.
    """

    name: Text
    revision: Revision = None
    dtype: Annotated[Literal["bfloat16", "float32", "float64"], Field(description="bfloat16, float32, float64")] = (
        "bfloat16"
    )
    trust_remote_code: Switch = False


class DataConfig(Section):
    """The rows that train, evaluate and test every trial; no row stands in two of the three.

    name: embedded name, local .jsonl, .csv or .parquet file, or hub id (`revision`; `subset`: the hub's config name).
    eval_name: local file with the eval rows. eval_split: the split with the eval rows. Neither: part of the train rows.
    test_name, test_split: the same of the test rows.
    forgetting_name: local .txt file, or one of the above with a column `text`, of plain text: its loss before and after
    training is recorded. num_forgetting: its first pieces of max_length tokens; null takes them all.
    columns: canonical column -> column in the data. max_length: tokens; longer rows are skipped and counted.
    num_train, num_eval, num_test: rows; num_train null takes them all. Settings are chosen on the eval rows; the test
    rows are looked at once, after the last step. loss_on: the tokens that count in the loss.
    """

    name: Text
    revision: Revision = None
    subset: OptionalText = None
    split: Text = "train"
    eval_name: OptionalText = None
    eval_split: OptionalText = None
    test_name: OptionalText = None
    test_split: OptionalText = None
    forgetting_name: OptionalText = None
    num_forgetting: OptionalCount = None
    columns: Annotated[
        dict[str, Text], Field(description=f"a mapping from {', '.join(CANONICAL_COLUMNS)} to the data's column names")
    ] = {}
    max_length: Annotated[
        int, Field(strict=True, ge=2, le=MAX_COUNT, description="a whole number of tokens from 2 on")
    ] = 512
    num_train: OptionalCount = None
    num_eval: Count = 64
    num_test: CountOrZero = 0
    loss_on: Annotated[Literal["completion", "all"], Field(description="completion, all")] = "completion"

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
    """How every trial trains; the keys in MEMBER_TRAINING_KEYS can differ between the trials of one pack.

    steps: optimizer steps. batch_size: rows per step of one trial, over all workers.
    lr: learning rate at the top of the schedule. schedule: its course after `warmup_steps` of linear warm-up.
    weight_decay, beta1, beta2, epsilon: AdamW's. clip_norm: largest gradient norm; null never clips.
    micro_batch_size: rows of each trial that a worker holds at once; it adds the gradients of one such part after
    another to those of the whole step. null: all of its rows at once.
    activation_checkpointing: keep the input of every layer alone and compute the rest again: less memory, slower steps.
    eval_every: steps; null evaluates at the start and the end only. report_every: steps; null makes about 50 reports.
    checkpoint_every: steps; null keeps none but the last. loss_threshold: eval loss whose first crossing is recorded.
    check_every: steps after which what must hold is checked, beside the first and the last step: the trainable set is
    the method's, frozen tensors have their bits, and eager steps keep as many bytes for backward as the first. null:
    after these two alone; 0: never.
    measure_steps: steps that each distinct method shape runs alone for its memory and speed; 0 measures nothing.
    """

    steps: Count
    batch_size: Count = 8
    lr: Positive = 1e-3
    schedule: Annotated[Literal["constant", "linear", "cosine"], Field(description="constant, linear, cosine")] = (
        "cosine"
    )
    warmup_steps: CountOrZero = 0
    weight_decay: NotNegative = 0.0
    clip_norm: OptionalPositive = 1.0
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    epsilon: Positive = 1e-8
    micro_batch_size: OptionalCount = None
    activation_checkpointing: Switch = False
    eval_every: OptionalCount = None
    report_every: OptionalCount = None
    checkpoint_every: OptionalCount = None
    loss_threshold: OptionalPositive = None
    check_every: OptionalCountOrZero = 100
    measure_steps: CountOrZero = 3

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
"""Training keys that decide what is observed, not what is trained: no part of a trial's identity, never an axis."""

HOLDING_KEYS = frozenset({"micro_batch_size"})
"""Training keys that decide what a step holds at once, and of its result the rounding alone (where there is dropout:
also the draws, as the number of workers does): no part of a trial's identity, never an axis."""


class WorkersConfig(Section):
    """The processes that train one pack.

    strategy: every worker holds the frozen base (replicate), or its share of it (shard). cpus_per_worker null: sized
    from the cluster.
    max_failures: how often they may die, and be replaced, before the pack they were at is given up.
    """

    num_workers: Count = 1
    strategy: Annotated[Literal["replicate", "shard"], Field(description="replicate, shard")] = "replicate"
    use_gpu: Annotated[Literal["auto"] | Switch, Field(description="auto, true, false")] = "auto"
    cpus_per_worker: OptionalPositive = None
    max_failures: CountOrZero = 3


class PackConfig(Section):
    """How many trials may share one copy of the base; 1 trains each alone."""

    max_members: Annotated[Literal["auto"] | Count, Field(description="auto, or a whole number from 1 on")] = "auto"


class EngineConfig(Section):
    """How steps run on a GPU: eager, graph (captured as a CUDA graph), compiled (and captured), or what pays: auto.

    deterministic: with kernels that repeat to the bit alone, as on a CPU they do anyway; on a GPU steps in bfloat16 are
    then a few percent slower, and a model that needs another kernel cannot be trained.
    """

    mode: Annotated[
        Literal["auto", "eager", "graph", "compiled"], Field(description="auto, eager, graph, compiled")
    ] = "auto"
    deterministic: Switch = False


class EarlyStoppingConfig(Section):
    """Trials that fall behind end early: at `grace_steps`, and at every `reduction_factor` times that, one in
    `reduction_factor` goes on.

    metric: what they are compared by, eval/loss or train/loss. Trials that can share a base are compared with those in
    the same workers; where `pack.max_members` is 1, every trial with all others of the sweep, by Tune's ASHA. A method
    that writes the base shares none: it is stopped by ASHA alone.
    """

    kind: Annotated[Literal["successive_halving"], Field(description="successive_halving")] = "successive_halving"
    metric: Annotated[Literal["eval/loss", "train/loss"], Field(description="eval/loss, train/loss")] = "eval/loss"
    grace_steps: Count
    reduction_factor: Annotated[int, Field(strict=True, ge=2, le=1000, description="a whole number from 2 to 1000")] = 3


class TrackingConfig(Section):
    """Where MLflow keeps the record; null: MLFLOW_TRACKING_URI, else an SQLite file under `storage.path`."""

    uri: OptionalText = None


class StorageConfig(Section):
    """Folder or URI (s3://bucket/path) of half-trained trials, plots and the default MLflow store."""

    path: Text = "loragrid-store"
