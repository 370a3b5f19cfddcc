"""A method's chosen setting with its figures, and the choices of a whole sweep."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from loragrid.comparison.ranking import is_higher_better
from loragrid.comparison.settings import Setting
from loragrid.formatting import format_value
from loragrid.tracking.store_uri import Scalar


@dataclass(frozen=True, kw_only=True)
class SeedSummary:
    """The mean and the standard deviation (n - 1) of a figure over `num` seeds. std: None for one seed.

    The deviation describes how much seeds differ on these rows. It is no interval of the method's expected figure,
    which also depends on the rows; see `MethodEstimate`.
    """

    mean: float
    std: float | None
    num: int


def summarize(values: Sequence[float]) -> SeedSummary:
    """The summary of at least one finite value; equal values have exactly their own value as mean."""
    sample = np.asarray(values, dtype=float)
    if len(sample) == 0 or not np.isfinite(sample).all():
        return SeedSummary(mean=math.nan, std=None, num=len(sample))
    if len(sample) == 1:
        return SeedSummary(mean=float(sample[0]), std=None, num=1)
    if np.ptp(sample) == 0:
        return SeedSummary(mean=float(sample[0]), std=0.0, num=len(sample))
    return SeedSummary(mean=float(sample.mean()), std=float(sample.std(ddof=1)), num=len(sample))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A method's best setting, by the mean of `metric` over seeds on the evaluation rows.

    evaluation, test: the figures of the chosen setting over seeds; test is None without test rows. With confirmation,
    `test` and `reported_trials` are of the trials with fresh seeds, and `is_confirmed` is true.
    reported_trials: seed -> trial id of the trials whose figures are compared.
    edges: axis -> best value, if that is at an end of its ladder. edge_sides: axis -> "lowest" or "highest".
    default: the method's untuned setting with its own figures; None if the sweep has no figures for it.
    default_fault: what is wrong with the default setting: no trial has finished, or one diverged or was stopped early.
    apart: axis -> value, for the axes by which the user splits the method into several contestants.
    """

    method: str
    setting: Setting
    metric: str
    evaluation: SeedSummary
    test: SeedSummary | None
    reported_trials: Mapping[int, str] = field(default_factory=dict)
    is_confirmed: bool = False
    edges: Mapping[str, Scalar]
    edge_sides: Mapping[str, str] = field(default_factory=dict)
    num_settings: int
    default: "Choice | None" = None
    default_fault: str = ""
    apart: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method, followed by the values of the axes in `apart`."""
        return " ".join([self.method, *(f"{axis} {format_value(value)}" for axis, value in self.apart.items())])


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Every contestant's choice, best first by the mean of the reported metric.

    metric: decides which setting is chosen. reported: compares the choices: a test metric, or `metric` without test
    rows. references: the choices of methods that train nothing, such as the untrained base; they are not compared.
    """

    metric: str
    reported: str
    choices: tuple[Choice, ...]
    references: tuple[Choice, ...]
    warnings: tuple[str, ...]

    @property
    def higher_is_better(self) -> bool:
        return is_higher_better(self.reported)


def reported_summary(choice: Choice, reported: str) -> SeedSummary | None:
    """The choice's figures of the reported metric over seeds; None if its trials lack the metric."""
    return choice.test if reported.startswith("test/") else choice.evaluation
