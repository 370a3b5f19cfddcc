"""The sections that define a trial: model, data and training, with their defaults."""

import math
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
    OptionalShare,
    OptionalText,
    Positive,
    Revision,
    Section,
    Switch,
    Text,
    Unit,
)

CANONICAL_COLUMNS = ("prompt", "completion", "messages", "system", "tools", "text", "weight", "train")


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
    """The rows that train, evaluate and test every trial; no row and no group is in two of the three splits."""

    name: Text = Field(
        description="Source of the rows: an embedded name, a local .jsonl, .json, .csv or .parquet file, or a hub id.",
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
        "before training, at every evaluation and after training; null records none.",
        examples=["encyclopedia.txt"],
    )
    num_forgetting: Annotated[OptionalCount, Unit("pieces of max_length tokens")] = Field(
        default=None, description="Number of leading pieces of the held-out text to use; null uses all.", examples=[64]
    )
    columns: Annotated[
        dict[str, Text], Allowed(f"a mapping from {', '.join(CANONICAL_COLUMNS)} to the data's column names")
    ] = Field(
        default={},
        description="Canonical column (prompt, completion; messages; text; beside them system, tools, weight, train) "
        "-> name of the column in the data; no other column is used.",
        examples=[{"prompt": "question", "completion": "answer"}],
    )
    shape: Annotated[
        Literal["messages", "prompt_completion", "alpaca", "alpaca_chat", "text"] | None,
        Allowed("messages, prompt_completion, alpaca, alpaca_chat, text, or null"),
    ] = Field(
        default=None,
        description="Shape of the rows: chats of OpenAI or ShareGPT (messages), question and answer under any of their "
        "names (prompt_completion), instruction and output in the prompt of Stanford Alpaca (alpaca) or as a chat "
        "(alpaca_chat), plain text; null recognises the shape if only one fits.",
        examples=["alpaca_chat"],
    )
    group_by: OptionalText = Field(
        default=None,
        description="Column of the data: rows with an equal value there are one group, which is in one split only; "
        "null makes rows with equal prompts one group (of chitchat, the rows of a conversation).",
        examples=["conversation_id"],
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

    turns: Annotated[Literal["auto", "all", "last", "separate"], Allowed("auto, all, last, separate")] = Field(
        default="auto",
        description="Turns of the assistant that a chat teaches: all, the last, or each as a row of its own "
        "(separate); auto takes all, or only the last of a chat whose earlier turns the template rewrites.",
        examples=["separate"],
    )
    chat_template: OptionalText = Field(
        default=None,
        description="Chat template: the name of one of the tokenizer's templates, or a file with a template; null uses "
        "the tokenizer's default.",
        examples=["templates/chatml.jinja", "tool_use"],
    )
    on_bad_row: Annotated[Literal["refuse", "skip"], Allowed("refuse, skip")] = Field(
        default="refuse",
        description="What happens to a row that is not as its file or its columns promise: the sweep is refused, "
        "naming the row (refuse), or the row is skipped and counted (skip).",
        examples=["skip"],
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
        if self.shape is not None and self.columns:
            what = "the columns already say how rows are read"
            problems.append(Problem(key="shape", value=self.shape, what=what, allowed="one of shape and columns"))
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
