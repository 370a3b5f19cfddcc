"""Builds `MethodScores` from an array, and finds a pair in a comparison."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loragrid.comparison.pairwise import MethodComparison, MethodScores, PairTest


def scores_of(values: NDArray[np.float64], **fields: Any) -> MethodScores:
    """values (M, S, N). Methods are called a, b, ...; each row is its own group of weight 1, unless fields say more."""
    num_methods, _, num_rows = values.shape
    defaults = {
        "names": tuple("abcdefghijklmno"[:num_methods]),
        "weights": np.ones(num_rows),
        "groups": np.arange(num_rows),
    }
    return MethodScores(**{**defaults, "values": values, **fields})


def pair(comparison: MethodComparison, first: str, second: str) -> PairTest:
    return next(test for test in comparison.pairs if (test.first, test.second) == (first, second))
