"""The sections `model` and `training`, with their defaults; `data_section` holds that of the rows."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from loragrid.schema.errors import ExperimentError, Problem
from loragrid.schema.fields import (
    Allowed,
    Count,
    CountOrZero,
    Decay,
    NotNegative,
    OptionalCount,
    OptionalCountOrZero,
    OptionalPositive,
    OptionalShare,
    Positive,
    Revision,
    Section,
    Switch,
    Text,
    Unit,
)


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


class TrainingConfig(Section):
    """How every trial trains; the keys in MEMBER_TRAINING_KEYS can differ between the trials of one pack."""

    steps: Annotated[OptionalCount, Unit("optimizer steps")] = Field(
        default=None, description="Length of the training of one trial; null takes it from `epochs`.", examples=[500]
    )
    epochs: Annotated[OptionalPositive, Unit("passes over the train rows")] = Field(
        default=None,
        description="Length of the training in passes over the train rows, whole or not, in place of `steps`: rounded "
        "up to whole steps of `batch_size` rows once the rows are known.",
        examples=[3, 0.5],
    )
    batch_size: Annotated[Count, Unit("rows")] = Field(
        default=8,
        description="Rows per optimizer step of one trial, over all workers and all micro batches: PEFT's and "
        "transformers' per_device_train_batch_size x gradient_accumulation_steps x processes.",
        examples=[16],
    )
    lr: Positive = Field(default=1e-3, description="Learning rate at the top of the schedule.", examples=[2e-4])
    schedule: Annotated[Literal["constant", "linear", "cosine"], Allowed("constant, linear, cosine")] = Field(
        default="cosine", description="Course of the learning rate after the warm-up.", examples=["linear"]
    )
    warmup_steps: Annotated[CountOrZero, Unit("optimizer steps")] = Field(
        default=0, description="Steps in which the learning rate rises linearly to `lr`.", examples=[20]
    )
    warmup_ratio: Annotated[OptionalShare, Unit("share of the steps")] = Field(
        default=None,
        description="Warm-up as a share of the steps, rounded up to whole steps, in place of `warmup_steps`; null uses "
        "`warmup_steps`.",
        examples=[0.03],
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
        description="Gradient accumulation: the rows of each trial that a worker holds at once, summing gradients over "
        "the step (transformers' per_device_train_batch_size); null holds all. The accumulation steps are `batch_size` "
        "over this and the number of workers.",
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
    forgetting_every: Annotated[OptionalCount, Unit("optimizer steps")] = Field(
        default=None,
        description="Steps between two measurements of the held-out text's loss (`data.forgetting_name`), beside those "
        "before the first and after the last step; null measures it at every evaluation.",
        examples=[200],
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
        default=5,
        description="Steps that each distinct method shape runs in a pack of one, in turns with the other shapes, to "
        "measure its speed; fewer than 5 show no spread, so that step times are not compared. 0 measures nothing, "
        "memory included.",
        examples=[10],
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> "TrainingConfig":
        problems = []
        if self.steps is not None and self.epochs is not None:
            what, allowed = f"training.steps is {self.steps} already", "one of the two: steps or epochs"
            problems.append(Problem(key="epochs", value=self.epochs, what=what, allowed=allowed))
        if self.warmup_ratio is not None and self.warmup_steps:
            what = f"training.warmup_steps is {self.warmup_steps} already"
            allowed = "one of the two: warmup_steps or warmup_ratio"
            problems.append(Problem(key="warmup_ratio", value=self.warmup_ratio, what=what, allowed=allowed))
        if self.steps is not None and self.warmup_steps > self.steps:
            what = f"longer than the training of {self.steps} steps"
            allowed = f"a whole number from 0 to {self.steps}"
            problems.append(Problem(key="warmup_steps", value=self.warmup_steps, what=what, allowed=allowed))
        if problems:
            raise ExperimentError(problems)
        return self

    @property
    def num_steps(self) -> int:
        """The optimizer steps of a trial whose length is known; `in_steps` makes it known."""
        assert self.steps is not None, "training.epochs is in steps once the rows are read, see trials/lengths.py"
        return self.steps

    def in_steps(self, num_rows: int) -> "TrainingConfig":
        """The same training with its length and its warm-up in steps, on `num_rows` train rows.

        Both are rounded up. As in transformers, `warmup_ratio` is a share of the steps.

        Raises:
            ExperimentError: the warm-up is longer than the training, or there are too many steps.
        """
        changes: dict[str, float | None] = {}
        steps = self.steps
        if steps is None:
            assert self.epochs is not None, "an experiment has one of the two, see config/checks.py"
            steps = ceiling(self.epochs * num_rows / self.batch_size)
            changes |= {"steps": steps, "epochs": None}
        if self.warmup_ratio is not None:
            changes |= {"warmup_steps": ceiling(self.warmup_ratio * steps), "warmup_ratio": None}
        return type(self).model_validate(self.model_dump() | changes) if changes else self

    def rows_at_once(self, num_workers: int) -> int:
        """The rows of one trial that each worker holds at once: a micro batch, or its whole share of the batch."""
        return self.micro_batch_size or self.rows_per_worker(num_workers)

    def rows_per_worker(self, num_workers: int) -> int:
        """The rows of one trial that each worker trains on in a step."""
        return self.batch_size // num_workers


def ceiling(number: float) -> int:
    """The next whole number; what only the rounding of floats lifts above a whole number is that number."""
    nearest = round(number)
    return nearest if math.isclose(number, nearest, rel_tol=1e-9) else math.ceil(number)


LENGTH_KEYS = ("steps", "epochs")
"""Training keys of which an experiment sets exactly one: they have no default, although each may be left out."""

MEMBER_TRAINING_KEYS = ("lr", "schedule", "warmup_steps", "warmup_ratio", "weight_decay", "clip_norm")
"""Training keys in which the trials of one pack may differ."""

METHOD_TRAINING_KEYS = (*MEMBER_TRAINING_KEYS, "batch_size")
"""Training keys that a method's block may set for itself; trials of another batch size are in other packs."""

OBSERVATION_KEYS = frozenset(
    {
        "eval_every",
        "forgetting_every",
        "report_every",
        "checkpoint_every",
        "check_every",
        "loss_threshold",
        "measure_steps",
    }
)
"""Training keys that decide what is observed, not what is trained; not in a trial's identity, never axes."""

HOLDING_KEYS = frozenset({"micro_batch_size"})
"""Training keys that decide how many rows a step holds at once; not in a trial's identity, never axes.

Like the number of workers, they change only rounding and, with dropout, the random draws.
"""
