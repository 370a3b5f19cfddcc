"""Scores that cannot be compared are refused with what is wrong and what is allowed."""

from typing import Any

import numpy as np
import pytest

from loragrid.comparison.pairwise import MethodScores


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": np.full((2, 3, 4), np.nan)}, "a: seed number 0, row 0 is nan; allowed: finite numbers"),
        ({"values": np.full((2, 3, 4), np.inf)}, "row 0 is inf; allowed: finite numbers"),
        ({"values": np.full((2, 3, 4), 1.5), "is_proportion": True}, "allowed: proportions from 0 to 1"),
        ({"values": np.zeros((2, 3))}, "values have the shape"),
        ({"values": np.zeros((3, 3, 4)), "names": ("a", "b")}, "values have the shape"),
        ({"values": np.zeros((2, 0, 4))}, "values have the shape"),
        ({"names": ("a", "a")}, "allowed: one or more different names"),
        ({"weights": np.ones(3)}, "weights have the shape"),
        ({"weights": np.array([1.0, 0.0, 1.0, 1.0])}, "a weight is not a positive number"),
        ({"weights": np.array([1.0, np.nan, 1.0, 1.0])}, "a weight is not a positive number"),
        ({"groups": np.zeros((2, 2), int)}, "groups have the shape"),
        ({"groups": np.zeros(4)}, "groups are of type float64"),
    ],
)
def test_impossible_scores_are_refused(fields: dict[str, Any], message: str) -> None:
    valid = {"names": ("a", "b"), "values": np.zeros((2, 3, 4)), "weights": np.ones(4), "groups": np.arange(4)}
    with pytest.raises(ValueError, match=message):
        MethodScores(**{**valid, **fields})
