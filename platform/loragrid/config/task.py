"""Checks the task of an experiment against its data."""

from collections.abc import Iterator, Mapping, Sequence

from loragrid.config.data_section import DataConfig
from loragrid.schema.errors import Problem


def task_problems(data: DataConfig, values_of: Mapping[str, Sequence[object]]) -> Iterator[Problem]:
    """The problems of data whose rows lack a prompt or an answer; `values_of`: axis of the grid -> its values."""
    allowed = "rows with a prompt (prompt and completion, or messages), or no task"
    if "text" in data.columns:
        yield Problem(
            key="data.columns", value=data.columns, what="rows of text have no prompt to answer", allowed=allowed
        )
    for value in values_of.get("data.loss_on", (data.loss_on,)):
        if value == "all":
            what = "every token is learnt, so prompts and answers cannot be separated"
            yield Problem(key="data.loss_on", value=value, what=what, allowed="completion, or no task")
