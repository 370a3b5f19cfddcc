"""Successive halving: the rungs, the ranking of settings, and the settings that continue."""

import pytest

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.trials.successive_halving import SettingScore, num_survivors, rank, rung_steps, score, survivors


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
    ("num_settings", "reduction_factor", "num_left"), [(9, 3, 3), (8, 3, 2), (2, 3, 1), (1, 3, 1), (5, 2, 2)]
)
def test_one_in_so_many_goes_on_and_always_one(num_settings: int, reduction_factor: int, num_left: int) -> None:
    scores = [score(f"setting-{index}", [10.0 - index], has_diverged=False) for index in range(num_settings)]
    best = [f"setting-{index}" for index in reversed(range(num_settings - num_left, num_settings))]
    assert [own.setting_id for own in survivors(rank(scores), reduction_factor)] == best
    assert num_survivors(num_settings, reduction_factor) == num_left


def test_of_equal_losses_the_earlier_continues() -> None:
    scores = [score(name, [1.0], has_diverged=False) for name in ("a", "b")]
    assert [own.setting_id for own in survivors(rank(scores), 2)] == ["a"]
    assert survivors(rank([]), 2) == []


def test_a_setting_counts_by_its_mean_over_seeds() -> None:
    lucky = score("lucky", [0.1, 2.9], has_diverged=False)
    steady = score("steady", [1.0, 1.2], has_diverged=False)
    assert rank([lucky, steady]) == [steady, lucky]
    assert lucky == SettingScore("lucky", 1.5, 2, False)


def test_a_setting_with_a_diverged_seed_is_last() -> None:
    found = [("a", 0.1, True), ("b", 5.0, False), ("c", 0.2, True)]
    scores = [score(name, [loss], has_diverged=diverged) for name, loss, diverged in found]
    assert [own.setting_id for own in rank(scores)] == ["b", "a", "c"]
