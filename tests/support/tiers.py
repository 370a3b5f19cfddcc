"""The tier of a test, the order in which tests start, and the cost limits of a unit test.

`make test` runs the unit tests and those marked `smoke`; `make test-all` runs everything but those marked `soak`.
"""

import os

import pytest

TIERS = ("end_to_end", "heavy", "soak")
"""The marks of tests that may take longer than a unit test."""
UNIT_TIMEOUT_SECONDS = 180
"""Limit of a unit test's wall time, fixtures included; generous, because machines are shared."""


def is_unit(item: pytest.Item) -> bool:
    """Whether the test has no mark that allows it more time."""
    return not any(item.get_closest_marker(mark) for mark in TIERS)


def arrange(items: list[pytest.Item]) -> None:
    """Put the longest tests first, keep each file's tests in one process, and limit the time of unit tests.

    With `--dist loadgroup` the processes take one group after the other. The tests of a file share expensive fixtures,
    so a file is a group unless its tests name another. Real sweeps start first; unit tests fill the gaps at the end.
    """
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
        if is_unit(item) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(UNIT_TIMEOUT_SECONDS))
    with_sweeps = {_group(item) for item in items if item.get_closest_marker("end_to_end")}
    items.sort(key=lambda item: _group(item) not in with_sweeps)


def _group(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return str(mark.args[0])


def cpu_seconds() -> float:
    """CPU seconds used by this process and by its ended children."""
    return sum(os.times()[:4])


def check_cpu(item: pytest.Item, used: float) -> None:
    """Fail a unit test whose call, without fixtures, used more CPU time than allowed."""
    limit = float(item.config.getini("unit_cpu_seconds"))
    if is_unit(item) and used > limit:
        pytest.fail(
            f"a unit test used {used:.1f} s of CPU time; allowed: {limit:g} s. "
            "Make it smaller, or mark it `heavy` (then it runs in make test-all only)",
            pytrace=False,
        )
