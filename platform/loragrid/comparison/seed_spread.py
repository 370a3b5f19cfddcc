"""How far methods vary over seeds at all settings that they tried, which shows a noisy method that was lucky in one.

The chosen setting tends to be one whose few seeds happened to agree. A method that is far noisier than the others then
seems as quiet as they are, and false claims about it become likely. Its other settings show the noise.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from loragrid.comparison.choice import Choice
from loragrid.comparison.method_scores import Floats
from loragrid.comparison.phases import split_phases
from loragrid.comparison.ranking import EVALUATION_LOSS, TEST_LOSS
from loragrid.comparison.settings import figure_in, rows_by_setting, seed_of
from loragrid.comparison.table import Comparison, plain_value

FAR_NOISIER = 3.0
"""A method is far noisier if its deviation over seeds is this many times that of a typical other method."""
FEWEST_SEEDS = 3


def known_seed_variances(comparison: Comparison, choices: Sequence[Choice], reported: str) -> Floats | None:
    """(M,): for `MethodScores.seed_variances`, what the settings of each choice's method show on evaluation rows.

    The variance of a far noisier method is the median over all its settings with three or more seeds; of any other
    method it is 0, which means that nothing is added. None: no method has several such settings, so nothing is known.
    reported: the metric of the test rows.
    """
    metric = EVALUATION_LOSS if reported == TEST_LOSS else reported.replace("test/", "eval/", 1)
    tuned, _ = split_phases(comparison)
    figures: list[list[dict[int, float]]] = [[] for _ in choices]
    for rows in rows_by_setting(tuned):
        found = {seed_of(tuned, row): figure_in(row, metric) for row in rows if row["status"] == "FINISHED"}
        present = {seed: value for seed, value in found.items() if value is not None}
        for own, choice in zip(figures, choices, strict=True):
            apart = all(plain_value(rows[0][axis]) == value for axis, value in choice.apart.items())
            if rows[0]["method"] == choice.method and apart:
                own.append(present)
    return far_noisier_variances(figures)


def far_noisier_variances(figures: Sequence[Sequence[Mapping[int, float]]]) -> Floats | None:
    """(M,): the variance over seeds of each method that is far noisier than the others, 0 for every other method.

    figures: by method and setting, seed -> figure. What a seed does to all settings is removed first: the median of
    their deviations from their own means. None: no method has several settings with three or more seeds.
    """
    deviations = [[_centred(own) for own in settings if len(own) >= FEWEST_SEEDS] for settings in figures]
    tried = np.array([len(own) for own in deviations])
    if len(figures) < 2 or (tried < 2).all():
        return None
    by_seed: dict[int, list[float]] = {}
    for own in itertools.chain.from_iterable(deviations):
        for seed, value in own.items():
            by_seed.setdefault(seed, []).append(value)
    shared = {seed: float(np.median(values)) for seed, values in by_seed.items()}
    typical = np.array([_typical_variance(settings, shared) for settings in deviations])
    others = np.array([_median_of_known(np.delete(typical, method)) for method in range(len(typical))])
    return np.where((tried > 1) & (typical >= FAR_NOISIER**2 * others), typical, 0.0)


def _centred(figures: Mapping[int, float]) -> dict[int, float]:
    mean = sum(figures.values()) / len(figures)
    return {seed: value - mean for seed, value in figures.items()}


def _typical_variance(settings: Sequence[Mapping[int, float]], shared: Mapping[int, float]) -> float:
    """The median over settings; NaN if there are none."""
    variances = [np.var([value - shared[seed] for seed, value in own.items()], ddof=1) for own in settings]
    return float(np.median(variances)) if variances else math.nan


def _median_of_known(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.inf
