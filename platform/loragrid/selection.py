"""Tuned against tuned: every method's best setting, chosen on validation rows and reported on test rows."""

from collections.abc import Mapping
from dataclasses import dataclass

from loragrid.statistics import Interval, PairedTest
from loragrid.tracking import Scalar


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method with one choice of its hyperparameters, over all its seeds.

    values: name of the axis column in `Comparison.table` -> value, of the axes that vary within the method, `seed`
    left out. trial_ids: seed -> trial, of those that finished. num_trials: all, with those that did not.
    """

    method: str
    values: Mapping[str, Scalar]
    trial_ids: Mapping[int, str]
    num_trials: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A method's best setting: lowest mean (highest, of an accuracy) of `metric` on the validation rows over seeds.

    validation, test: of the chosen setting; test is None where the sweep has no test rows. edges: axis -> best value,
    where it is the lowest or highest of a ladder of at least two. default: the method's untuned setting in the same
    sweep, with its own figures; None where the sweep does not hold it.
    """

    method: str
    setting: Setting
    metric: str
    validation: Interval
    test: Interval | None
    edges: Mapping[str, Scalar]
    num_settings: int
    default: "Choice | None" = None


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Two methods' choices against each other, `over_seeds` and `over_items` where there are enough of them."""

    first: str
    second: str
    metric: str
    over_seeds: PairedTest | None
    over_items: PairedTest | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a sweep shows: choices best first, every pair of them, and sentences a reader can quote.

    metric: what is reported, `test/loss` or `test/accuracy` (`eval/final_loss`, `eval/accuracy` without test rows).
    """

    metric: str
    higher_is_better: bool
    choices: tuple[Choice, ...]
    contrasts: tuple[Contrast, ...]
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
