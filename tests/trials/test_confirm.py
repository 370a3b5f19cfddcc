"""Chosen settings are trained again with seeds that no trial of the grid has."""

from typing import Any

import pytest

from loragrid.config.experiment import PackConfig
from loragrid.trials.confirm import Chosen, confirm_trials, fresh_seeds
from loragrid.trials.expand import expand
from loragrid.trials.load import experiment_from_mapping
from loragrid.trials.packing import group_into_packs
from loragrid.trials.trial import Trial


def trials(**changes: Any) -> list[Trial]:
    mapping: dict[str, Any] = {
        "name": "x",
        "model": {"name": "m"},
        "data": {"name": "d"},
        "training": {"steps": 20},
        "methods": [{"name": "lora", "label": "LoRA", "grid": {"lr": [1e-3, 1e-2]}}],
        "grid": {"seed": [0, 1]},
    }
    return expand(experiment_from_mapping(mapping | changes, "x.yaml"))


def test_fresh_seeds_follow_the_largest_seed_of_the_grid() -> None:
    assert fresh_seeds({0, 1, 2}, 3) == (3, 4, 5)
    assert fresh_seeds({7, 100}, 4) == (101, 102, 103, 104)


def test_recorded_seeds_are_kept_when_the_grid_grows() -> None:
    assert fresh_seeds({0, 1, 20}, 3, (2, 3, 4)) == (2, 3, 4)
    assert fresh_seeds({0, 1, 20}, 5, (2, 3, 4)) == (2, 3, 4, 21, 22)
    assert fresh_seeds({0, 1}, 5, (2, 3, 4)) == (2, 3, 4, 5, 6)


def test_a_grid_that_spends_a_fresh_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grid.seed: 3: .* confirmed settings with the seeds 2, 3, 4"):
        fresh_seeds({0, 1, 3}, 3, (2, 3, 4))


def test_a_confirming_trial_differs_only_in_seed_and_phase() -> None:
    first, _, other, _ = trials()
    again = confirm_trials([first, other], (2, 3, 4))
    assert [(trial.seed, trial.training.lr) for trial in again] == [(s, lr) for lr in (1e-3, 1e-2) for s in (2, 3, 4)]
    assert {trial.phase for trial in again} == {"confirm"}
    assert {trial.label for trial in again} == {"LoRA"}
    assert again[0].parameters() == first.parameters() | {"seed": 2}
    in_the_grid = next(trial for trial in trials(grid={"seed": [2]}) if trial.training.lr == 1e-3)
    assert again[0].trial_id == in_the_grid.trial_id, "the phase is no part of a trial's identity"


def test_packs_that_confirm_have_names_of_their_own() -> None:
    own = trials()
    config = PackConfig(max_members=4)
    assert [pack.pack_id for pack in group_into_packs(own, config)] == ["pack-000"]
    names = [pack.pack_id for pack in group_into_packs(confirm_trials(own[::2], (2, 3, 4)), config)]
    assert names == ["confirm-000", "confirm-001"]


def test_a_recorded_choice_names_settings_whatever_their_seeds() -> None:
    first, second, other, _ = trials()
    chosen = Chosen.of([second], (2, 3, 4))
    assert Chosen.from_text(chosen.to_text()) == chosen == Chosen.of([first], (2, 3, 4))
    assert chosen.has(first)
    assert not chosen.has(other)
    assert Chosen.from_text("") == Chosen()
