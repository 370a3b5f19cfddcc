"""Intervals over seeds and paired tests between methods: what a difference must show before it is called one."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The mean of `num` values; what so few values do not give (the deviation of one) is None."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    num: int


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """The difference of two methods, first minus second, on the same seeds or the same items.

    test: its name in words. num: pairs. p_adjusted: after Holm's correction over the family it was tested in.
    """

    test: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    num: int
