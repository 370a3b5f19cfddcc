"""The keys shared by all task kinds that generate answers."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from loragrid.schema.errors import ExperimentError, Problem
from loragrid.schema.fields import Allowed, OptionalPositive, Seed, Unit
from loragrid.tasks.contract import Generation, TaskConfig

MAX_NEW_TOKENS = 32_768


class GeneratingTask(TaskConfig):
    """A task whose prompts are answered by generation: greedy unless `temperature` is set."""

    max_new_tokens: Annotated[
        int,
        Field(strict=True, ge=1, le=MAX_NEW_TOKENS),
        Allowed(f"a whole number from 1 to {MAX_NEW_TOKENS}"),
        Unit("tokens"),
    ] = Field(default=256, description="Longest generated answer.", examples=[64])
    temperature: OptionalPositive = Field(
        default=None, description="Temperature of sampling; null decodes greedily.", examples=[0.7]
    )
    top_p: Annotated[
        float | None,
        Field(strict=True, gt=0, le=1, allow_inf_nan=False),
        Allowed("a number above 0 and up to 1, or null"),
    ] = Field(
        default=None,
        description="Probability mass of the likeliest tokens that sampling draws from; null draws from all.",
        examples=[0.9],
    )
    seed: Seed = Field(
        default=0, description="Seed of sampling; a row's draws depend only on the seed and the row.", examples=[1]
    )

    @property
    def generation(self) -> Generation:
        """As `TaskConfig`."""
        top_p = 1.0 if self.top_p is None else self.top_p
        return Generation(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=top_p, seed=self.seed)

    @property
    def decoding(self) -> str:
        """As `TaskConfig`."""
        limit = f"at most {self.max_new_tokens} new tokens"
        if self.temperature is None:
            return f"greedy, {limit}"
        return (
            f"sampled at temperature {self.temperature:g}, top_p {self.generation.top_p:g}, seed {self.seed}, {limit}"
        )

    @model_validator(mode="after")
    def _check_combinations(self) -> "GeneratingTask":
        if problems := [*self.answer_problems(), *self._sampling_problems()]:
            raise ExperimentError(problems)
        return self

    def answer_problems(self) -> Iterator[Problem]:
        """The problems of the kind's own keys; none by default."""
        yield from ()

    def _sampling_problems(self) -> Iterator[Problem]:
        for key in ("top_p", "seed"):
            if self.temperature is None and self.is_changed(key):
                what = "decoding is greedy, so the key has no effect"
                yield Problem(key=key, value=getattr(self, key), what=what, allowed=f"temperature set, or no {key}")
