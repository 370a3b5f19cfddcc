"""The section `data`: the rows that train, evaluate and test every trial."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from loragrid.schema.errors import ExperimentError, Problem
from loragrid.schema.fields import (
    MAX_COUNT,
    Allowed,
    Count,
    CountOrZero,
    OptionalCount,
    OptionalText,
    Revision,
    Section,
    Text,
    Unit,
)

CANONICAL_COLUMNS = ("prompt", "completion", "messages", "system", "tools", "text", "weight", "train")


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
