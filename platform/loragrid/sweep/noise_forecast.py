"""Predicts the noise floor of a sweep: the difference of two methods that its seeds and test rows can show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from loragrid.comparison.noise_floor import (
    MIN_GROUPS,
    MIN_SEEDS,
    MOST_SEEDS,
    Design,
    Noise,
    more_rows_help,
    seeds_to_show,
    smallest_difference,
)
from loragrid.formatting import count_of
from loragrid.sweep.noise_history import RecordedNoise, recorded_noise
from loragrid.tasks.contract import Figure

if TYPE_CHECKING:
    from loragrid.planning.plan import Plan
    from loragrid.trials.trial import Trial

LOSS_PRIOR = Noise(seed_deviation=0.0045, pair_row_deviation=0.044, row_seed_deviation=0.0)
"""Deviations as shares of the loss, from the published comparison of nine methods (docs/findings/rejudge_gsm8k.py).

Its record does not say which part of the rows' deviation comes from seeds. None is assumed, so more seeds do not lower
it.
"""
PROPORTION_PRIOR = Noise(seed_deviation=0.015, pair_row_deviation=0.0, row_seed_deviation=0.5)
"""Binomial sampling of answers of which half are right, the noisiest case, and 1.5 points over seeds."""
LOSS_SOURCE = "the published GSM8K finding (no sweep of this base and task is recorded here)"
PROPORTION_SOURCE = "answers of which half are right (no sweep of this base and task is recorded here)"
WANTED_SHARE = 0.01
"""The difference that a reader would like to see: 1 % of the loss, or one point of a proportion."""


@dataclass(frozen=True, kw_only=True)
class NoiseForecast:
    """What a sweep can show on one base and data set.

    figure: the task's reported figure; None for the loss. level: the loss or figure that is expected; None if it is not
    known, and then the noise is in shares of it. source: where the noise comes from. design: see there; its groups are
    those that `num_test` rows are expected to make. are_seeds_fresh: whether its seeds have no part in any choice.
    """

    model: str
    data: str
    figure: Figure | None
    level: float | None
    noise: Noise
    source: str
    design: Design
    num_test: int
    are_seeds_fresh: bool = False

    @property
    def wanted(self) -> float:
        """1 % of the loss, or one point of a proportion, in the unit of the noise."""
        if self.figure is not None and self.figure.is_proportion:
            return WANTED_SHARE
        return WANTED_SHARE * (1.0 if self.level is None else abs(self.level))

    @property
    def difference(self) -> float | None:
        """The smallest difference that is shown with 80 % power; None: no claim about methods is possible."""
        return smallest_difference(self.noise, self.design)

    @property
    def seeds_for_wanted(self) -> int | None:
        """The number of seeds that would show `wanted` with these test rows; None if there is none up to 50."""
        return seeds_to_show(self.noise, self.design, self.wanted)

    def sentences(self) -> list[str]:
        """The forecast as one or two lines of a plan."""
        design, difference = self.design, self.difference
        if difference is not None:
            first = (
                f"noise floor: {self._means} can show differences of about {self._shown(difference)} between "
                f"{count_of(design.num_methods, 'method')} ({count_of(design.num_pairs, 'pair')}), {self._origin}"
            )
            return [first, self._more()]
        if self.num_test == 0:
            return ["noise floor: no claim about methods is possible without test rows (data.num_test)"]
        if design.num_groups < MIN_GROUPS:
            rows = f"{count_of(self.num_test, 'test row')} (data.num_test)"
            return [f"noise floor: no claim about methods is possible with {rows}; {MIN_GROUPS} is the least"]
        least = replace(design, num_seeds=MIN_SEEDS)
        possible = smallest_difference(self.noise, least)
        assert possible is not None, "seeds are the only obstacle that is left"
        first = (
            f"noise floor: with {count_of(design.num_seeds, 'seed')} no claim about methods is possible; {MIN_SEEDS} "
            f"seeds could show differences of about {self._shown(possible)}, {self._origin}"
        )
        return [first, self._more()]

    def to_dict(self) -> dict[str, object]:
        """The forecast as JSON can hold it. Differences and deviations are shares of the loss if `level` is null."""
        return {
            "model": self.model,
            "data": self.data,
            "metric": "test/loss" if self.figure is None else f"test/{self.figure.name}",
            "level": self.level,
            **asdict(self.design),
            "num_test_rows": self.num_test,
            "smallest_difference": self.difference,
            "obstacle": self.design.obstacle,
            "wanted_difference": self.wanted,
            "seeds_for_wanted_difference": self.seeds_for_wanted,
            "more_rows_help": self.num_test == 0 or more_rows_help(self.noise, self.design),
            "noise": asdict(self.noise),
            "source": self.source,
        }

    @property
    def _means(self) -> str:
        seeds = count_of(self.design.num_seeds, "fresh seed" if self.are_seeds_fresh else "seed")
        return f"{seeds} and {count_of(self.num_test, 'test row')}"

    @property
    def _origin(self) -> str:
        return f"with noise as in {self.source}"

    def _more(self) -> str:
        """What would show the wanted difference."""
        wanted = "one point" if self.wanted == WANTED_SHARE and self._is_proportion else f"1 % of the {self._noun}"
        num_seeds = self.seeds_for_wanted
        fewest = seeds_to_show(self.noise, replace(self.design, num_groups=math.inf), self.wanted)
        with_rows = f"{count_of(fewest or 0, 'seed')} with many more test rows"
        if num_seeds is None:
            if fewest is None:
                return f"{wanted}: not even {MOST_SEEDS} seeds would show it, with any number of test rows"
            return f"{wanted}: {MOST_SEEDS} seeds would not show it with these test rows, but {with_rows} would"
        if num_seeds <= self.design.num_seeds:
            return f"{wanted}: these seeds can show it"
        other = f", or {with_rows}" if fewest is not None and fewest < num_seeds else "; more test rows would not help"
        return f"{wanted}: about {num_seeds} seeds would show it{other}"

    @property
    def _is_proportion(self) -> bool:
        return self.figure is not None and self.figure.is_proportion

    @property
    def _noun(self) -> str:
        return "loss" if self.figure is None else self.figure.words

    def _shown(self, difference: float) -> str:
        if self._is_proportion:
            return f"{_digits(100 * difference)} points of {self._noun}"
        if self.level is None:
            return f"{_digits(100 * difference)} % of the {self._noun}"
        share = f" ({_digits(100 * difference / abs(self.level))} % of the {self._noun})" if self.level else ""
        return f"{_digits(difference)}{share}"


def forecast_noise(plan: "Plan") -> list[NoiseForecast]:
    """The forecast for every base and data set of the plan on which two or more methods are compared.

    The noise is that of the latest recorded sweep of this base, data and kind of task in the experiment's store,
    otherwise a prior. A figure that is neither a loss nor a proportion has no prior, and no forecast before a sweep.
    """
    experiment = plan.experiment
    parts: dict[tuple[str, str], list[Trial]] = {}
    for trial in plan.trials:
        if plan.counts[trial.trial_id].trainable:  # a method that trains nothing is a reference, and is not compared
            parts.setdefault((trial.model.name, trial.data.name), []).append(trial)
    found = []
    for trials in parts.values():
        first = trials[0]
        num_methods = len(_seeds_by_method(trials))
        if num_methods < 2:
            continue
        recorded = recorded_noise(first, experiment.storage.path, experiment.tracking.uri)
        forecast = _forecast(first, recorded, num_methods, _num_pairs(plan, num_methods), _num_seeds(plan, trials))
        if forecast is not None:
            found.append(replace(forecast, are_seeds_fresh=experiment.confirm is not None))
    return found


def _forecast(
    trial: "Trial", recorded: RecordedNoise | None, num_methods: int, num_pairs: int, num_seeds: int
) -> NoiseForecast | None:
    figure = None if trial.task is None else trial.task.figures[0]
    num_test = trial.data.num_test
    if recorded is not None:
        level: float | None = recorded.level
        noise, source, groups_per_row = recorded.noise, f"sweep {recorded.sweep}", recorded.groups_per_row
    elif figure is None:
        level, noise, source, groups_per_row = None, LOSS_PRIOR, LOSS_SOURCE, 1.0
    elif figure.is_proportion:
        level, noise, source, groups_per_row = None, PROPORTION_PRIOR, PROPORTION_SOURCE, 1.0
    else:
        return None
    design = Design(
        num_methods=num_methods, num_pairs=num_pairs, num_seeds=num_seeds, num_groups=groups_per_row * num_test
    )
    return NoiseForecast(
        model=trial.model.name,
        data=trial.data.name,
        figure=figure,
        level=level,
        noise=noise,
        source=source,
        design=design,
        num_test=num_test,
    )


def _seeds_by_method(trials: "Sequence[Trial]") -> Mapping[str, set[int]]:
    seeds: dict[str, set[int]] = {}
    for trial in trials:
        seeds.setdefault(trial.label or trial.method.name, set()).add(trial.seed)
    return seeds


def _num_seeds(plan: "Plan", trials: "Sequence[Trial]") -> int:
    """The seeds that the verdict rests on: the fresh ones of `confirm`, otherwise those that all methods have."""
    if plan.experiment.confirm is not None:
        return plan.experiment.confirm.seeds
    return len(set.intersection(*_seeds_by_method(trials).values()))


def _num_pairs(plan: "Plan", num_methods: int) -> int:
    """The pairs of the family that the experiment plans: all pairs, or every method against one."""
    if plan.experiment.verdict.against is not None:
        return num_methods - 1
    return num_methods * (num_methods - 1) // 2


def _digits(value: float) -> str:
    """Two digits, without an exponent for what people read."""
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
