"""Lengths in epochs become steps once the rows are known, at one place, and the same training has the same id."""

from typing import Any

import pytest

from loragrid.config.experiment import Experiment, ExperimentError, PackConfig, TrainingConfig
from loragrid.config.sections import ceiling
from loragrid.trials.expand import expand
from loragrid.trials.lengths import NumRows, complete
from loragrid.trials.load import experiment_from_mapping
from loragrid.trials.packing import group_into_packs
from loragrid.trials.trial import Trial


def experiment(training: dict[str, Any], methods: list[Any] | None = None, **sections: Any) -> Experiment:
    mapping = {
        "name": "lengths",
        "model": {"name": "a-model"},
        "data": {"name": "rows.jsonl"},
        "training": training,
        "methods": methods or ["lora"],
    }
    return experiment_from_mapping(mapping | sections, "lengths.yaml")


def completed(asked: Experiment, num_rows: int = 40) -> list[Trial]:
    return complete(expand(asked), lambda trial: NumRows(train=num_rows), asked.early_stopping)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "num_rows", "steps"),
    [
        (1, 4, 40, 10),
        (3, 4, 41, 31),
        (0.5, 8, 100, 7),
        (0.01, 8, 40, 1),
        (2.5, 3, 10, 9),
        (0.1, 1, 30, 3),
        (7, 7, 7, 7),
    ],
)
def test_epochs_are_rounded_up_to_whole_steps(epochs: float, batch_size: int, num_rows: int, steps: int) -> None:
    (trial,) = completed(experiment({"epochs": epochs, "batch_size": batch_size}), num_rows)
    assert trial.training.num_steps == steps
    assert trial.parameters()["training.steps"] == steps
    assert trial.parameters()["training.epochs"] == epochs


@pytest.mark.parametrize("parts", [3, 7, 10, 49, 1000])
def test_rounding_of_floats_adds_no_step(parts: int) -> None:
    # 0.1 * 30 is 3.0000000000000004.
    assert [ceiling(n / parts * parts) for n in range(1, 200)] == list(range(1, 200))
    assert ceiling(3.001) == 4


@pytest.mark.parametrize(("ratio", "warmup"), [(0, 0), (0.03, 1), (0.1, 1), (0.25, 3), (1, 10)])
def test_a_warmup_ratio_is_a_rounded_up_share(ratio: float, warmup: int) -> None:
    for training in ({"epochs": 1}, {"steps": 10}):
        (trial,) = completed(experiment({**training, "batch_size": 4, "warmup_ratio": ratio}))
        assert (trial.training.warmup_steps, trial.training.warmup_ratio) == (warmup, None)
        assert trial.parameters()["training.warmup_ratio"] == ratio


def test_the_id_is_that_of_the_same_steps() -> None:
    in_epochs = completed(experiment({"epochs": 2, "warmup_ratio": 0.1, "batch_size": 4}))
    in_steps = completed(experiment({"steps": 20, "warmup_steps": 2, "batch_size": 4}))
    assert [trial.trial_id for trial in in_epochs] == [trial.trial_id for trial in in_steps]
    assert in_epochs[0].setting_id == in_steps[0].setting_id
    assert completed(experiment({"epochs": 2, "batch_size": 4}), 44)[0].trial_id != in_steps[0].trial_id


def test_methods_with_other_batch_sizes_get_other_steps_and_packs() -> None:
    asked = experiment(
        {"epochs": 3, "batch_size": 4}, ["lora", {"name": "vera", "batch_size": 8}], grid={"seed": [0, 1]}
    )
    trials = completed(asked)
    assert [(trial.method.name, trial.training.num_steps) for trial in trials] == [
        ("lora", 30),
        ("lora", 30),
        ("vera", 15),
        ("vera", 15),
    ]
    packs = group_into_packs(trials, PackConfig())
    assert [{trial.training.num_steps for trial in pack.trials} for pack in packs] == [{30}, {15}]


def test_members_with_different_warmup_ratios_share_a_pack() -> None:
    asked = experiment({"epochs": 1, "batch_size": 4}, ["lora"], grid={"training.warmup_ratio": [0, 0.1, 0.5]})
    (pack,) = group_into_packs(completed(asked), PackConfig())
    assert [trial.training.warmup_steps for trial in pack.trials] == [0, 1, 5]


def test_epochs_are_an_axis_without_a_value_in_the_section() -> None:
    trials = completed(experiment({"batch_size": 4}, grid={"training.epochs": [1, 2, 0.5]}))
    assert [trial.training.num_steps for trial in trials] == [10, 20, 5]


def test_epochs_that_are_the_same_steps_are_refused() -> None:
    with pytest.raises(ExperimentError, match=r"training\.epochs: .*1\.01 .*and .*1\.02 .*both 11 steps"):
        completed(experiment({"batch_size": 4}, grid={"training.epochs": [1.01, 1.02]}))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"steps": 10, "epochs": 1}, r"training\.epochs: 1.*: training\.steps is 10 already; allowed: one of the two"),
        ({}, r"training\.steps: is missing; allowed: a whole number .*; or training\.epochs: a number above 0"),
        ({"epochs": 0}, r"training\.epochs: 0: .*allowed: a number above 0"),
        ({"epochs": -1}, r"training\.epochs: -1: .*allowed: a number above 0"),
        (
            {"steps": 9, "warmup_steps": 1, "warmup_ratio": 0.1},
            r"training\.warmup_ratio: 0\.1: training\.warmup_steps is 1",
        ),
        ({"steps": 9, "warmup_ratio": 10}, r"training\.warmup_ratio: 10: .*allowed: a number from 0 to 1"),
    ],
)
def test_a_length_that_is_no_length_is_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        experiment(training)


@pytest.mark.parametrize(
    ("training", "sections", "message"),
    [
        (
            {"epochs": 1, "warmup_steps": 11},
            {},
            r"training\.warmup_steps: 11: longer than the training of 10 steps \(tr",
        ),
        ({"epochs": 1e9}, {}, r"training\.steps: .*allowed: a whole number"),
        (
            {"epochs": 0.5},
            {"early_stopping": {"grace_steps": 5}},
            r"grace_steps: 5: no trial of 5 steps .*epochs: 0\.5",
        ),
        ({"epochs": 0.5}, {"methods": [{"name": "delta_lora", "start_step": 9}]}, r"methods: delta_lora: .*5 steps"),
    ],
)
def test_a_length_that_the_rows_make_impossible_is_refused(
    training: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExperimentError, match=message):
        completed(experiment({"batch_size": 4, **training}, **sections))


def test_open_numbers_are_recorded_as_used() -> None:
    (trial,) = complete(
        expand(experiment({"steps": 3}, data={"name": "rows.jsonl", "forgetting_name": "text.txt"})),
        lambda trial: NumRows(train=40, forgetting=7),
    )
    assert {"data.num_train": 40, "data.num_forgetting": 7}.items() <= trial.parameters().items()
    asked = experiment({"steps": 3}, data={"name": "rows.jsonl", "num_train": 9})
    (trial,) = completed(asked, 9)
    assert (trial.found, trial.parameters()["data.num_train"]) == ({}, 9)
    assert trial == expand(asked)[0]


def test_seeds_that_confirm_keep_what_was_found() -> None:
    (trial,) = completed(experiment({"epochs": 2, "batch_size": 4}))
    fresh = trial.with_seed(7, "confirm")
    assert fresh.parameters() == trial.parameters() | {"seed": 7}
    assert fresh.asked_id == ""
    assert trial.asked_id != trial.trial_id


def test_a_training_in_steps_is_not_copied() -> None:
    training = TrainingConfig(steps=3)
    assert training.in_steps(100) is training
