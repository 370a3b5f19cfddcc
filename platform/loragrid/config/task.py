"""The task section of an experiment file: what counts as a right answer, beside the loss."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from loragrid.config.sections import DataConfig
from loragrid.schema.errors import ExperimentError, Problem
from loragrid.schema.fields import Allowed, OptionalCount, OptionalPositive, OptionalText, Section, Seed, Switch, Text

MAX_NEW_TOKENS = 32_768

ANSWER_KEYS = ("answer_after", "answer_pattern", "answer_at", "normalise")
DECODING_KEYS = ("max_new_tokens", "temperature", "top_p", "seed")
LIKELIHOOD_KEYS = ("labels", "likelihood")
KEYS_OF_KIND = {"exact_match": (*ANSWER_KEYS, *DECODING_KEYS), "label_likelihood": LIKELIHOOD_KEYS}


class TaskConfig(Section):
    """What is counted on the evaluation and test rows: the share of rows that a trial answers right.

    exact_match: the prompt is answered by generation; right is an answer equal to that of the row's completion. The
    answer is what follows `answer_after` on its line, or the one group of `answer_pattern` (a regular expression), at
    its last or first place in the text (`answer_at`); with neither, the whole text. `normalise`: text compares without
    outer and repeated blanks; number compares the first number in the answer by its value, without commas.
    max_new_tokens: where generation ends at the latest. Decoding is greedy, unless `temperature` is set; it then
    samples from the likeliest tokens that make up `top_p`, with draws from `seed` and the row alone.

    label_likelihood: the prompt is answered with the likeliest of all completions that the rows have, or of `labels`;
    likelihood: the log-likelihood summed over a completion's tokens, or its mean per_token.

    every: steps between two looks at the evaluation rows; null looks before the first step and after the last. The
    test rows are looked at once, after the last. base: whether to look before the first.
    """

    kind: Annotated[Literal["exact_match", "label_likelihood"], Allowed("exact_match, label_likelihood")]
    answer_after: OptionalText = None
    answer_pattern: OptionalText = None
    answer_at: Annotated[Literal["last", "first"], Allowed("last, first")] = "last"
    normalise: Annotated[Literal["text", "number"], Allowed("text, number")] = "text"
    max_new_tokens: Annotated[
        int,
        Field(strict=True, ge=1, le=MAX_NEW_TOKENS),
        Allowed(f"a whole number from 1 to {MAX_NEW_TOKENS}"),
    ] = 256
    temperature: OptionalPositive = None
    top_p: Annotated[
        float | None,
        Field(strict=True, gt=0, le=1, allow_inf_nan=False),
        Allowed("a number above 0 and up to 1, or null"),
    ] = None
    seed: Seed = 0
    labels: Annotated[
        tuple[Text, ...] | None, Field(min_length=2), Allowed("a list of at least two completions, or null")
    ] = None
    likelihood: Annotated[Literal["summed", "per_token"], Allowed("summed, per_token")] = "summed"
    every: OptionalCount = None
    base: Switch = True

    @model_validator(mode="after")
    def _check_combinations(self) -> "TaskConfig":
        problems = [*self._foreign_keys(), *self._answer_problems(), *self._sampling_problems()]
        if self.labels is not None and len({label.strip() for label in self.labels}) < len(self.labels):
            what = "a label stands twice (blanks around it do not count)"
            problems.append(Problem(key="labels", value=self.labels, what=what, allowed="every label once"))
        if problems:
            raise ExperimentError(problems)
        return self

    def _foreign_keys(self) -> Iterator[Problem]:
        for kind, keys in KEYS_OF_KIND.items():
            for key in keys:
                if kind != self.kind and self._is_changed(key):
                    what = f"belongs to kind: {kind}, and means nothing to {self.kind}"
                    yield Problem(key=key, value=getattr(self, key), what=what, allowed=f"kind: {kind}, or no {key}")

    def _answer_problems(self) -> Iterator[Problem]:
        if self.answer_after is not None and self.answer_pattern is not None:
            what = f"the answer is already what follows answer_after ({self.answer_after})"
            yield Problem(key="answer_pattern", value=self.answer_pattern, what=what, allowed="one of the two")
        if self.answer_pattern is not None:
            key, value, allowed = "answer_pattern", self.answer_pattern, "a regular expression with one group"
            try:
                num_groups = re.compile(self.answer_pattern).groups
            except (re.error, RecursionError, OverflowError) as error:
                yield Problem(key=key, value=value, what=f"is no regular expression: {error}", allowed=allowed)
                return
            if num_groups != 1:
                what = f"has {num_groups} groups, and the answer is what the one group holds"
                yield Problem(key=key, value=value, what=what, allowed=f"{allowed}; (?:...) groups without holding")
        if self._is_changed("answer_at") and self.answer_after is None and self.answer_pattern is None:
            what = "the whole text is the answer: it has no first or last place"
            yield Problem(
                key="answer_at", value=self.answer_at, what=what, allowed="answer_after or answer_pattern set"
            )

    def _sampling_problems(self) -> Iterator[Problem]:
        for key in ("top_p", "seed"):
            if self.temperature is None and self._is_changed(key):
                what = "decoding is greedy, and draws nothing"
                yield Problem(key=key, value=getattr(self, key), what=what, allowed=f"temperature set, or no {key}")

    def _is_changed(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def decoding(self) -> str:
        """How answers are made, in words: nothing is left to a model's own settings."""
        if self.kind == "label_likelihood":
            return f"the likeliest completion, log-likelihood {self.likelihood.replace('_', ' ')}"
        limit = f"at most {self.max_new_tokens} new tokens"
        if self.temperature is None:
            return f"greedy, {limit}"
        top_p = 1.0 if self.top_p is None else self.top_p
        return f"sampled at temperature {self.temperature:g}, top_p {top_p:g}, seed {self.seed}, {limit}"


def task_parameters(task: TaskConfig) -> dict[str, str | int | float | bool | None]:
    """Key -> value of everything that means something to the task's kind, flat."""
    foreign = {key for kind, keys in KEYS_OF_KIND.items() if kind != task.kind for key in keys}
    return {
        key: ",".join(value) if isinstance(value, tuple) else value
        for key, value in task.model_dump(exclude=foreign).items()
    }


TASK_OBSERVATION_KEYS = frozenset({"every", "base"})
"""Task keys that decide when is looked, not what is found after the last step: no part of a trial's identity."""


def task_problems(data: DataConfig, values_of: Mapping[str, Sequence[object]]) -> Iterator[Problem]:
    """What keeps rows from having a prompt and an answer; `values_of`: the values of the axes of the grid."""
    allowed = "rows with a prompt (prompt and completion, or messages), or no task"
    if "text" in data.columns:
        yield Problem(
            key="data.columns", value=data.columns, what="rows of text have no prompt to answer", allowed=allowed
        )
    for value in values_of.get("data.loss_on", (data.loss_on,)):
        if value == "all":
            what = "where every token is learnt, no prompt is told from its answer"
            yield Problem(key="data.loss_on", value=value, what=what, allowed="completion, or no task")
