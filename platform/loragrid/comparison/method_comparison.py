"""The result of comparing methods in pairs: tests of pairs, estimates of methods, and what is refused."""

from dataclasses import dataclass
from typing import Literal

LEVEL = 0.05
"""The probability of any false claim in a family; intervals have the confidence 1 - LEVEL."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The pairs that are tested together, chosen before the run: all, or one method against every other."""

    kind: Literal["all_pairs", "against"] = "all_pairs"
    against: str = ""


ALL_PAIRS = Family()


@dataclass(frozen=True, kw_only=True)
class PairTest:
    """The difference of two methods, first minus second, in the direction of the metric.

    p_value: two-sided, of this pair; None if refused. p_adjusted: after Holm's correction over the family; None if
    refused or outside the family. low, high: the simultaneous 95 % interval: all intervals of the family are right at
    once in at least 95 % of sweeps; for a pair outside the family, pair_low and pair_high. pair_low, pair_high: the
    95 % interval of this pair alone. Where nothing is known, intervals are infinite and the deviation is NaN.
    refusal: why nothing is claimed about this pair; "" if there may be a claim.
    """

    first: str
    second: str
    difference: float
    standard_error: float
    degrees_of_freedom: float
    p_value: float | None
    p_adjusted: float | None
    low: float
    high: float
    pair_low: float
    pair_high: float
    in_family: bool
    refusal: str
    higher_is_better: bool

    @property
    def is_shown(self) -> bool:
        """Whether a difference is shown: Holm's corrected p-value is below 0.05."""
        return self.p_adjusted is not None and self.p_adjusted < LEVEL

    @property
    def better(self) -> str:
        """The name of the method that is shown to be better; "" if no difference is shown."""
        if not self.is_shown:
            return ""
        return self.first if (self.difference > 0) == self.higher_is_better else self.second


@dataclass(frozen=True, kw_only=True)
class MethodEstimate:
    """One method's mean with its 95 % interval, which is of the expected figure over new seeds and new rows.

    It decides nothing: the rows of two methods are the same, so overlapping intervals say nothing about a difference.
    behind: with 95 % confidence for all methods at once, the method is at most this far behind the best (Hsu 1984).
    low, high, standard_error, behind: None if refused, or if nothing bounds them.
    """

    name: str
    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    behind: float | None


@dataclass(frozen=True, kw_only=True)
class MethodComparison:
    """All pairs, in the order of `itertools.combinations(names)`, and all methods, in the order of names.

    claims_about: what the tests are about, see `compare_methods` and `compare_trained_models`.
    best_group: the methods that are not shown worse than any other.
    effective_groups: the number of groups of equal weight that would say as much about new rows.
    seed_deviation: of one method's mean over seeds, without the noise of the rows; root mean square over the methods.
    row_deviation: of a pair's difference, averaged over the seeds, over groups; root mean square over the pairs.
    row_seed_deviation: of one method's seed x row noise. row_deviation² is 2 row_seed_deviation² / S plus a part that
        does not depend on the seeds. NaN stands for a deviation that one seed or one group cannot show.
    far_noisier: the methods whose pairs typically vary over seeds at least three times as much as the other pairs.
    refusal: why nothing at all is claimed; "" if claims are possible. caveats: what weakens the claims.
    """

    claims_about: Literal["methods", "trained models"]
    pairs: tuple[PairTest, ...]
    estimates: tuple[MethodEstimate, ...]
    best_group: tuple[str, ...]
    num_seeds: int
    num_rows: int
    num_groups: int
    effective_groups: float
    seed_deviation: float
    row_deviation: float
    row_seed_deviation: float
    far_noisier: tuple[str, ...]
    refusal: str
    caveats: tuple[str, ...]
