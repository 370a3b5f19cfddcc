"""The noise floor: the smallest difference of two methods that a sweep can show, and how many seeds would show more.

A claim about two methods is about new seeds and new rows, so both blur the difference. The formula is that of a power
analysis for the verdict's own test: Satterthwaite's (1946) degrees of freedom, and the limit of Holm's first step.
It is a floor and no promise: in simulations 64 to 89 % of the differences of this size are found, of accuracies 30 to
70 %. Below the floor, "not told apart" says little.
"""

import math
from dataclasses import dataclass, replace

from scipy import special  # scipy.stats would take a second to import, and `loragrid plan` needs this

SIGNIFICANCE = 0.05
POWER = 0.8
MIN_SEEDS = 3
"""With fewer seeds, the verdict makes no claim about methods."""
MIN_GROUPS = 10
"""With fewer independent rows (effective groups), the verdict makes no claim."""
MOST_SEEDS = 50
"""More seeds than this are never proposed."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What blurs the difference of two methods, as standard deviations in the metric's own unit.

    seed_deviation: of one method's test mean over seeds, without what the rows add to it.
    pair_row_deviation: of what a group of rows adds to the difference of two methods, whatever their seeds.
    row_seed_deviation: of what one seed adds to that for one method.
    """

    seed_deviation: float
    pair_row_deviation: float
    row_seed_deviation: float

    def __post_init__(self) -> None:
        for name in ("seed_deviation", "pair_row_deviation", "row_seed_deviation"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}: {value} is no standard deviation; allowed: a finite number of 0 or more")

    @classmethod
    def measured(
        cls, *, seed_deviation: float, row_deviation: float, row_seed_deviation: float, num_seeds: int
    ) -> "Noise":
        """The noise of a sweep with `num_seeds` seeds.

        row_deviation: over groups, of a pair's difference averaged over these seeds. Its square is that of
        `pair_row_deviation` and 2 / num_seeds times that of `row_seed_deviation`.
        """
        rest = row_deviation**2 - 2 * row_seed_deviation**2 / num_seeds
        return cls(
            seed_deviation=seed_deviation,
            pair_row_deviation=math.sqrt(max(0.0, rest)),
            row_seed_deviation=row_seed_deviation,
        )

    def row_deviation(self, num_seeds: int) -> float:
        """The deviation over groups of a pair's difference that is averaged over `num_seeds` seeds."""
        return math.sqrt(self.pair_row_deviation**2 + 2 * self.row_seed_deviation**2 / num_seeds)


@dataclass(frozen=True, kw_only=True)
class Design:
    """What decides, beside the noise, how small a difference can be shown.

    num_groups: independent rows, in effect: (sum of the groups' weights)² / sum of their squares. It need not be whole.
    num_pairs: the pairs of methods in the family of tests: all of them, or one less than there are methods.
    """

    num_methods: int
    num_pairs: int
    num_seeds: int
    num_groups: float

    @property
    def obstacle(self) -> str:
        """Why no difference can be shown, however large; "" if one can be shown."""
        if self.num_methods < 2 or self.num_pairs < 1:
            return "there is no pair of methods to compare"
        if self.num_seeds < MIN_SEEDS:
            return f"a claim about methods needs {MIN_SEEDS} seeds or more"
        if self.num_groups < MIN_GROUPS:
            return f"a claim about methods needs {MIN_GROUPS} independent test rows or more"
        return ""


def smallest_difference(noise: Noise, design: Design, power: float = POWER) -> float | None:
    """The true difference of two methods that the verdict shows with this probability; None: see `Design.obstacle`.

    Half of the degrees of freedom that the seeds of other methods can lend are counted, because how many they lend is
    known only after the sweep.
    """
    if design.obstacle:
        return None
    own, num_methods = design.num_seeds - 1, design.num_methods
    lent = num_methods * (design.num_seeds - 2) / 2
    seed_freedom = own if num_methods == 2 else min(own + lent, (num_methods - 1) * own)
    of_seeds, of_rows = _variances(noise, design)
    # The seeds' share is raised by its own standard error, as in the test itself.
    raised = of_seeds * (1 + math.sqrt(2 / seed_freedom))
    squares = raised**2 / seed_freedom + of_rows**2 / (design.num_groups - 1)
    if squares == 0:
        return 0.0
    freedom = (raised + of_rows) ** 2 / squares
    limit = special.stdtrit(freedom, 1 - SIGNIFICANCE / 2 / design.num_pairs) + special.stdtrit(freedom, power)
    return float(limit) * math.sqrt(of_seeds + of_rows)


def seeds_to_show(noise: Noise, design: Design, difference: float, most: int = MOST_SEEDS) -> int | None:
    """The smallest number of seeds with which this difference is shown; None if more than `most` are needed.

    The number of seeds in `design` is ignored.

    Raises:
        ValueError: the difference is not above 0.
    """
    if not difference > 0:
        raise ValueError(f"difference: {difference} cannot be shown; allowed: a number above 0")
    for num_seeds in range(MIN_SEEDS, most + 1):
        shown = smallest_difference(noise, replace(design, num_seeds=num_seeds))
        if shown is not None and shown <= difference:
            return num_seeds
    return None


def more_rows_help(noise: Noise, design: Design) -> bool:
    """Whether more test rows would lower the floor noticeably: the rows add a quarter or more of what the seeds add."""
    of_seeds, of_rows = _variances(noise, design)
    return of_rows > 0 and of_rows >= of_seeds / 4


def _variances(noise: Noise, design: Design) -> tuple[float, float]:
    """The variances of the difference of two methods' means: over seeds, over rows."""
    of_seeds = 2 * noise.seed_deviation**2 / design.num_seeds
    return of_seeds, noise.row_deviation(design.num_seeds) ** 2 / design.num_groups
