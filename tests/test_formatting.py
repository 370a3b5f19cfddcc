"""The formats of numbers for people."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from loragrid.formatting import (
    count_of,
    format_bytes,
    format_count,
    format_roughly,
    format_seconds,
    format_seconds_range,
    format_value,
    is_missing,
)


@pytest.mark.parametrize("value", [None, math.nan, np.float64("nan"), pd.NA])
def test_a_cell_without_a_measurement_is_missing(value: Any) -> None:
    assert is_missing(value)
    assert format_value(value) == "–"


@pytest.mark.parametrize("value", [0, 0.0, "", False, "nan", np.float64(1.0), math.inf])
def test_a_value_is_not_missing(value: Any) -> None:
    assert not is_missing(value)


def test_numbers_have_three_digits_and_a_unit() -> None:
    assert [format_count(value) for value in (999, 999.6, 460_800, 1_234_567)] == ["999", "1 K", "461 K", "1.23 M"]
    assert [format_bytes(value) for value in (1000, 1536, 3 * 2**30)] == ["0.977 KiB", "1.5 KiB", "3 GiB"]
    assert format_bytes(2**20, like=2**30) == "0.000977 GiB"
    assert [format_seconds(value) for value in (0.0123, 12.345, 600.0)] == ["12.3 ms", "12.3 s", "10 min"]


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.3123, 0.3589, "310 to 360 ms"),
        (3.123, 3.589, "3.1 to 3.6 s"),
        (1.3501, 1.3502, "1.35 s"),
        (1.349, 1.351, "1.35 s"),
        (0.000123, 0.000124, "0.123 to 0.124 ms"),
        (12.0, 31.0, "10 to 30 s"),
        (0.004, 0.4, "4 to 400 ms"),
        (0.0, 31.0, "0 to 30 s"),
        (700.0, 720.0, "11.7 to 12.0 min"),
        (5.0, 5.0, "5.00 s"),
        (0.0, 0.0, "0 ms"),
    ],
)
def test_a_measured_time_has_the_digits_of_its_spread(low: float, high: float, text: str) -> None:
    assert format_seconds_range(low, high) == text


def test_a_rough_number_has_two_digits() -> None:
    assert [format_roughly(value) for value in (1283.0, 0.01689, 9.96, 0.0, 12.0)] == [
        "1,300", "0.017", "10.0", "0", "12"
    ]  # fmt: skip


def test_settings_are_short_and_counts_have_a_noun() -> None:
    assert [format_value(value) for value in (8, 0.001, 1e-05, "all-linear")] == ["8", "0.001", "1e-05", "all-linear"]
    assert [count_of(number, "trial") for number in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]


def test_formatting_imports_no_pandas() -> None:
    folder = Path(__file__).resolve().parents[1] / "platform"
    code = "import sys, loragrid.formatting as f; print(f.is_missing(None), f.is_missing(1), 'pandas' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["True", "False", "False"]
