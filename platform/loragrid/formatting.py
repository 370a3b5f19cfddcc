"""Formats numbers for people: counts with their noun, parameters, bytes, seconds, settings."""

import math
import sys
from collections.abc import Sequence
from typing import Any


def is_missing(value: Any) -> bool:
    """Whether a cell holds no measurement: None, NaN or pandas' NA."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    # pandas is not imported here, because that is slow: a process that has not imported it cannot hold its NA.
    pandas = sys.modules.get("pandas")
    return pandas is not None and value is getattr(pandas, "NA", None)


def count_of(number: int, noun: str) -> str:
    """The number with its noun; the noun gets an `s` unless the number is one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_value(value: object) -> str:
    """A setting in its shortest form: 8, 0.001, 1e-05, all-linear. Floats keep ten digits."""
    if is_missing(value):
        return "–"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def format_count(value: float) -> str:
    """A number of parameters with three digits: 461 K for 460,800, 1.23 M for 1,234,567."""
    return _with_unit(value, 1000.0, ("", " K", " M", " G", " T"))


def format_bytes(value: float, like: float | None = None) -> str:
    """A number of bytes with three digits, in the binary unit that suits it, or that suits `like` bytes."""
    return _with_unit(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB"), like)


def format_seconds(value: float) -> str:
    """A duration with three digits: in ms below 1 s, in min from 600 s on, otherwise in s."""
    factor, unit = _unit_of_seconds(value)
    return f"{value * factor:.3g} {unit}"


def format_seconds_range(low: float, high: float) -> str:
    """A measured duration with the digits that its spread supports: `0.31 to 0.36 s`, or `1.35 s` if both round to it.

    The last digit is at the place of the spread's first digit or, if the lower end is smaller than that, of its own
    first digit. There are at most three digits.
    """
    factor, unit = _unit_of_seconds(high)
    low, high = low * factor, high * factor
    spread = high - low
    most = 2 - math.floor(math.log10(high)) if high > 0 else 0  # three digits
    supported = [-math.floor(math.log10(value)) for value in (spread, low) if value > 0]
    places = min(most, max(supported)) if spread > 0 else most
    texts = [_rounded(value, places) for value in (low, high)]
    return f"{texts[0]} {unit}" if texts[0] == texts[1] else f"{texts[0]} to {texts[1]} {unit}"


def format_seconds_roughly(value: float) -> str:
    """A measured duration with two digits, in the unit that `format_seconds` would choose."""
    factor, unit = _unit_of_seconds(value)
    return f"{format_roughly(value * factor)} {unit}"


def format_roughly(value: float) -> str:
    """A measured number with two digits: 1,300 for 1,283; 0.017 for 0.01689."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    return _rounded(value, 1 - math.floor(math.log10(abs(value))))


def _unit_of_seconds(value: float) -> tuple[float, str]:
    """(Factor, unit) for a duration in seconds."""
    return (1000.0, "ms") if value < 1.0 else (1.0, "s") if value < 600.0 else (1 / 60, "min")


def _rounded(value: float, places: int) -> str:
    """The value with this number of decimal places; negative ones round to tens, hundreds and so on."""
    return f"{round(value, places):,.{max(0, places)}f}"


def _with_unit(value: float, base: float, units: Sequence[str], like: float | None = None) -> str:
    index, size = 0, abs(value if like is None else like)
    # The next unit begins at 999.5, because three digits would show 999.6 as 1e+03.
    while size >= 999.5 and index < len(units) - 1:
        value, size = value / base, size / base
        index += 1
    return f"{value:.3g}{units[index]}"
