"""Corrects the p-values of several tests that make one statement together."""

import math
from collections.abc import Sequence


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of the p-values of a family of tests.

    If a level is applied to the corrected values, the probability of any false positive in the family is at most that
    level (Holm 1979, "A simple sequentially rejective multiple test procedure"). None and NaN mean "not tested": they
    become None and do not count as tests.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None and not math.isnan(p))
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted
