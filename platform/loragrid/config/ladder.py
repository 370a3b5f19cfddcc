"""A geometric ladder of values, the short way to write an axis: `lr: {ladder: [1.0e-4, 1.0e-2], points: 5}`."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from loragrid.schema.errors import ExperimentError, Problem, show_value, unknown, what_is_wrong

MAX_POINTS = 100
SIGNIFICANT_DIGITS = 4
EXAMPLE = "such as {ladder: [1.0e-4, 1.0e-2], points: 5}"


class Ladder(tuple[Any, ...]):
    """The values of an axis that was written as a ladder, and how it was written.

    MLflow records the written form: a best value at an end of a ladder shows that the ladder is too short.
    """

    written: dict[str, object]

    def __new__(cls, values: Iterable[Any], written: Mapping[str, object]) -> "Ladder":
        ladder = super().__new__(cls, values)
        ladder.written = dict(written)
        return ladder

    def __getnewargs__(self) -> tuple[tuple[Any, ...], dict[str, object]]:
        return tuple(self), self.written


def as_written(values: tuple[Any, ...]) -> Any:
    """An axis as it is written in a file: a ladder's ends and points, otherwise the values."""
    return dict(values.written) if isinstance(values, Ladder) else values


def ladder_values(key: str, ladder: Mapping[object, object]) -> list[int | float]:
    """The values of a ladder, lowest first, with equal ratios between its two ends.

    The ends are used as written. Values between them are rounded to four significant digits, or to whole numbers if
    both ends are whole.

    Raises:
        ExperimentError: naming the axis `key`, what is wrong and what is allowed.
    """
    for name in ladder:
        if name not in ("ladder", "points"):
            raise ExperimentError([unknown("key of a ladder", str(name), ["ladder", "points"], key=key, value=ladder)])
    ends, points = ladder.get("ladder"), ladder.get("points")
    if not (isinstance(ends, list | tuple) and len(ends) == 2 and all(_is_positive(end) for end in ends)):
        what = "a ladder goes from one number above 0 to another"
        if isinstance(ends, list | tuple):
            texts = {end: what_is_wrong(end, "a number") for end in ends if isinstance(end, str)}
            what += "".join(f"; {show_value(text)} {mistake}" for text, mistake in texts.items())
        raise ExperimentError([Problem(key=f"{key}.ladder", value=ends, what=what, allowed=EXAMPLE)])
    low, high = ends
    if not low < high:
        raise ExperimentError(
            [Problem(key=f"{key}.ladder", value=ends, what="a ladder begins at its lowest value", allowed=EXAMPLE)]
        )
    if type(points) is not int or not 2 <= points <= MAX_POINTS:
        allowed = f"a whole number from 2 to {MAX_POINTS}"
        raise ExperimentError([Problem(key=f"{key}.points", value=points, what="is not allowed", allowed=allowed)])
    is_whole = type(low) is int and type(high) is int
    between = [low * (high / low) ** (place / (points - 1)) for place in range(1, points - 1)]
    values = [low, *(round(value) if is_whole else _rounded(value) for value in between), high]
    if len(set(values)) < points:
        what = f"{points} points between {low} and {high} are not all different"
        raise ExperimentError([Problem(key=key, value=dict(ladder), what=what, allowed="fewer points")])
    return values


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
