"""Contests: whose settings are ranked together, and how they are divided over the places of a cluster."""

from typing import Any

import pytest

import loragrid as lg
from loragrid.config.experiment import EarlyStoppingConfig, PackConfig
from loragrid.trials.contests import by_contest, by_setting, divide, method_of
from loragrid.trials.expand import expand
from loragrid.trials.packing import Pack, assign_queues, group_into_packs
from loragrid.trials.trial import Trial

METHODS = ["lora", "lora_plus", "vera", "delta_lora", "full"]
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
HALVING = EarlyStoppingConfig(grace_steps=2)
OVER_ALL = EarlyStoppingConfig(grace_steps=2, within="sweep")


def trials_of(methods: list[Any], grid: dict[str, Any], **sections: Any) -> list[Trial]:
    made = lg.Experiment(
        name="contests",
        model={"name": "a"},
        data={"name": "rows.jsonl", "max_length": 64},
        methods=methods,
        grid=grid,
        **{"training": {"steps": 20, "batch_size": 4}} | sections,
    )
    return expand(made)


@pytest.fixture(scope="module")
def whole() -> list[Trial]:
    """5 methods x 5 rates x 3 seeds."""
    methods = [{"name": name, "start_step": 1} if name == "delta_lora" else name for name in METHODS]
    return trials_of(methods, {"training.lr": RATES, "seed": [0, 1, 2]})


def test_a_setting_is_the_trials_that_differ_in_seed(whole: list[Trial]) -> None:
    settings = by_setting(whole)
    assert [len(setting) for setting in settings] == [3] * 25
    assert all(len({(t.method, t.training) for t in setting}) == 1 for setting in settings)


def test_a_method_or_the_whole_sweep_is_a_contest(whole: list[Trial]) -> None:
    assert [{method_of(t) for t in contest} for contest in by_contest(whole, HALVING)] == [{name} for name in METHODS]
    assert [len(contest) for contest in by_contest(whole, OVER_ALL)] == [75]


def test_blocks_with_a_common_label_are_one_contest() -> None:
    blocks = [{"name": "lora", "label": "tuned", "grid": {"lr": rates}} for rates in ([1e-3], [1e-2])]
    labels = [[method_of(t) for t in contest] for contest in by_contest(trials_of([*blocks, "vera"], {}), HALVING)]
    assert labels == [["tuned", "tuned"], ["vera"]]


def test_other_tasks_and_numbers_of_steps_are_other_contests() -> None:
    grid = {"model.name": ["a", "b"], "training.steps": [20, 40], "training.batch_size": [4, 8], "seed": [0, 1]}
    contests = by_contest(trials_of(["lora"], grid), OVER_ALL)
    assert [{(t.model.name, t.training.steps) for t in contest} for contest in contests] == [
        {("a", 20)}, {("a", 40)}, {("b", 20)}, {("b", 40)}
    ]  # fmt: skip
    assert {len(by_setting(contest)) for contest in contests} == {2}, "both batch sizes"


@pytest.mark.parametrize("num_places", [1, 2, 4, 5])
def test_a_place_trains_whole_methods(whole: list[Trial], num_places: int) -> None:
    parts = divide(whole, HALVING, num_places)
    assert len(parts) == num_places
    names = [method_of(trial) for part in parts for trial in part]
    assert sorted(names) == sorted(method_of(trial) for trial in whole)
    assert all(sum(name in {method_of(t) for t in part} for part in parts) == 1 for name in METHODS)
    assert max(map(len, parts)) - min(map(len, parts)) <= 15


def test_unknown_places_make_every_contest_a_part(whole: list[Trial]) -> None:
    assert [len(part) for part in divide(whole, HALVING, 0)] == [15] * 5


@pytest.mark.parametrize(
    ("config", "num_places", "sizes"),
    [(HALVING, 8, [15] * 5), (OVER_ALL, 4, [18, 18, 18, 21]), (OVER_ALL, 40, [9] * 7 + [12])],
)
def test_a_divided_contest_can_still_be_reduced(
    whole: list[Trial], config: EarlyStoppingConfig, num_places: int, sizes: list[int]
) -> None:
    parts = divide(whole, config, num_places)
    assert sorted(len(part) for part in parts) == sizes
    settings = [setting for part in parts for setting in by_setting(part)]
    assert len(settings) == 25, "no setting is divided"
    assert all(len(by_setting(part)) >= config.reduction_factor for part in parts)


def test_parts_of_a_ladder_hold_low_and_high_values() -> None:
    trials = trials_of(["lora"], {"training.lr": {"ladder": [1e-5, 1e-1], "points": 8}, "seed": [0, 1]})
    parts = divide(trials, EarlyStoppingConfig(grace_steps=2, reduction_factor=4), 2)
    rates = [sorted({trial.training.lr for trial in part}) for part in parts]
    assert [len(part) for part in rates] == [4, 4]
    assert rates[0][0] < rates[1][0] < rates[0][-1] < rates[1][-1]


def queues_of(trials: list[Trial], config: PackConfig, num_places: int) -> list[list[Pack]]:
    packs = group_into_packs(trials, config, num_places, early_stopping=HALVING)
    return [list(queue.packs) for queue in assign_queues(packs, num_places or len(packs))]


@pytest.mark.parametrize("most", [1, 2, 7, "auto"])
@pytest.mark.parametrize("num_places", [0, 1, 2, 3, 8])
def test_all_settings_of_a_method_share_a_queue(whole: list[Trial], most: Any, num_places: int) -> None:
    queues = queues_of(whole, PackConfig(max_members=most), num_places)
    found = [{method_of(t) for pack in queue for t in pack.trials} for queue in queues]
    assert len(queues) == min(num_places or 5, 5)
    assert sorted(name for names in found for name in names) == sorted(METHODS)
    packs = [pack for queue in queues for pack in queue]
    assert sorted(t.trial_id for pack in packs for t in pack.trials) == sorted(t.trial_id for t in whole)
    assert len({pack.pack_id for pack in packs}) == len(packs)
    if most != "auto":
        assert max(len(pack.trials) for pack in packs) <= most


def test_halves_of_a_pack_stay_in_its_rung_group(whole: list[Trial]) -> None:
    packs = group_into_packs(whole, PackConfig(max_members=4), 2, early_stopping=HALVING)
    halves = [half for pack in packs for half in pack.halves()]
    assert [len(queue.packs) for queue in assign_queues(halves, 40)] == [
        sum(half.rung_group == number for half in halves) for number in (0, 1)
    ]
