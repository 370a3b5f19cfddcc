"""Successive halving: the rungs, and the trials that continue."""

import pytest

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.trials.successive_halving import rank, rung_steps, survivors


@pytest.mark.parametrize(
    ("grace_steps", "reduction_factor", "steps", "rungs"),
    [
        (3, 3, 27, [3, 9, 27]),
        (3, 3, 28, [3, 9, 27, 28]),
        (1, 2, 10, [1, 2, 4, 8, 10]),
        (9, 10, 10, [9, 10]),
    ],
)
def test_rungs_are_powers_of_the_factor(grace_steps: int, reduction_factor: int, steps: int, rungs: list[int]) -> None:
    config = EarlyStoppingConfig(grace_steps=grace_steps, reduction_factor=reduction_factor)
    assert rung_steps(config, steps) == rungs
    assert rung_steps(None, steps) == [steps]


@pytest.mark.parametrize(
    ("num_trials", "reduction_factor", "num_left"), [(9, 3, 3), (8, 3, 2), (2, 3, 1), (1, 3, 1), (5, 2, 2)]
)
def test_one_in_so_many_goes_on_and_always_one(num_trials: int, reduction_factor: int, num_left: int) -> None:
    losses = {f"trial-{index}": 10.0 - index for index in range(num_trials)}
    best = [f"trial-{index}" for index in reversed(range(num_trials - num_left, num_trials))]
    assert survivors(rank(losses), reduction_factor) == best


def test_of_equal_losses_the_earlier_continues() -> None:
    assert survivors(rank({"a": 1.0, "b": 1.0}), 2) == ["a"]
    assert survivors(rank({}), 2) == []
