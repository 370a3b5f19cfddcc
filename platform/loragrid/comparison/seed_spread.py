"""How far methods vary over seeds at all settings that they tried, which shows a noisy method that was lucky in one.

The chosen setting tends to be one whose few seeds happened to agree. A method that is far noisier than the others then
seems as quiet as they are, and false claims about it become likely. Its other settings show the noise.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from loragrid.comparison.choice import Choice
from loragrid.comparison.method_scores import Floats
from loragrid.comparison.phases import split_phases
from loragrid.comparison.ranking import EVALUATION_LOSS, TEST_LOSS
from loragrid.comparison.settings import rows_by_setting
from loragrid.comparison.table import Comparison, plain_value
from loragrid.formatting import is_missing

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
    figures: list[list[list[float]]] = [[] for _ in choices]
    for rows in rows_by_setting(split_phases(comparison)[0]):
        values: list[Any] = [row.get(metric) for row in rows if row["status"] == "FINISHED"]
        present = [float(value) for value in values if not is_missing(value) and math.isfinite(value)]
        for own, choice in zip(figures, choices, strict=True):
            apart = all(plain_value(rows[0][axis]) == value for axis, value in choice.apart.items())
            if rows[0]["method"] == choice.method and apart:
                own.append(present)
    return far_noisier_variances(figures)


def far_noisier_variances(figures: Sequence[Sequence[Sequence[float]]]) -> Floats | None:
    """(M,): the variance over seeds of each method that is far noisier than the others, 0 for every other method.

    figures: by method and setting, one figure per seed. None: no method has several settings with three or more seeds.
    """
    variances = [[float(np.var(own, ddof=1)) for own in settings if len(own) >= FEWEST_SEEDS] for settings in figures]
    tried = np.array([len(own) for own in variances])
    if len(figures) < 2 or (tried < 2).all():
        return None
    typical = np.array([np.median(own) if own else np.nan for own in variances])
    others = np.array([_median_of_known(np.delete(typical, method)) for method in range(len(typical))])
    return np.where((tried > 1) & (typical >= FAR_NOISIER**2 * others), typical, 0.0)


def _median_of_known(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.inf
