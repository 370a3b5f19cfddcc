"""An experiment expands into exactly the trials that its axes describe, with ids that change only if results change."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loragrid.config.experiment import Experiment, ExperimentError
from loragrid.trials.expand import expand, trial_from_axes
from loragrid.trials.load import experiment_from_mapping, load_experiment
from loragrid.trials.trial import Trial

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def experiment(**changes: Any) -> Experiment:
    mapping: dict[str, Any] = {
        "name": "x",
        "model": {"name": "m"},
        "data": {"name": "d"},
        "training": {"steps": 20},
        "methods": ["lora"],
    }
    return experiment_from_mapping(mapping | changes, "x.yaml")


def table(trials: list[Trial], *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(trial.parameters().get(key) for key in keys) for trial in trials]


def test_without_axes_each_method_has_one_trial() -> None:
    trials = expand(experiment(methods=["lora", "frozen"]))
    assert table(trials, "method.name", "method.rank", "seed") == [("lora", 8, 0), ("frozen", None, 0)]


def test_trials_follow_the_files_order_with_seeds_last() -> None:
    methods = ["vera", {"name": "lora", "grid": {"alpha": [16, 32], "lr": [1e-3, 1e-4]}}]
    trials = expand(experiment(methods=methods, grid={"seed": [1, 0], "method.rank": [8, 4]}))
    assert table(trials[:4], "method.name", "method.rank", "seed") == [
        ("vera", 8, 1),
        ("vera", 8, 0),
        ("vera", 4, 1),
        ("vera", 4, 0),
    ]
    assert table(trials[4:9], "method.alpha", "training.lr", "method.rank", "seed") == [
        (16.0, 1e-3, 8, 1),
        (16.0, 1e-3, 8, 0),
        (16.0, 1e-3, 4, 1),
        (16.0, 1e-3, 4, 0),
        (16.0, 1e-4, 8, 1),
    ]
    assert len(trials) == 4 + 16


def test_an_axis_applies_to_methods_that_leave_it_open() -> None:
    methods = ["lora", {"name": "vera", "rank": 64}, {"name": "lora_plus", "grid": {"rank": [2]}}, "frozen"]
    trials = expand(experiment(methods=methods, grid={"method.rank": [4, 8]}))
    assert table(trials, "method.name", "method.rank") == [
        ("lora", 4),
        ("lora", 8),
        ("vera", 64),
        ("lora_plus", 2),
        ("frozen", None),
    ]


def test_a_methods_own_learning_rate_overrides_axis_and_section() -> None:
    methods = [
        "lora",
        {"name": "vera", "lr": 0.1, "clip_norm": None},
        {"name": "lora_plus", "grid": {"lr": [0.2, 0.3]}},
    ]
    trials = expand(experiment(methods=methods, grid={"training.lr": [0.01, 0.02]}))
    assert table(trials, "method.name", "training.lr", "training.clip_norm") == [
        ("lora", 0.01, 1.0),
        ("lora", 0.02, 1.0),
        ("vera", 0.1, None),
        ("lora_plus", 0.2, 1.0),
        ("lora_plus", 0.3, 1.0),
    ]
    assert [trial.training.lr for trial in trials] == [0.01, 0.02, 0.1, 0.2, 0.3]


def test_model_data_and_lists_of_target_modules_can_be_axes() -> None:
    grid = {
        "model.dtype": ["bfloat16", "float32"],
        "data.max_length": [512, 64],
        "method.target_modules": [["q_proj", "v_proj"], "all-linear"],
    }
    trials = expand(experiment(grid=grid))
    assert len({trial.trial_id for trial in trials}) == 8
    assert {(trial.model.dtype, trial.data.max_length) for trial in trials} == {
        ("bfloat16", 512),
        ("bfloat16", 64),
        ("float32", 512),
        ("float32", 64),
    }
    assert table(trials[:2], "method.target_modules") == [("q_proj,v_proj",), ("all-linear",)]


def test_trials_share_the_sections_that_no_axis_changes() -> None:
    whole = experiment(grid={"training.lr": [0.1, 0.2]})
    first, second = expand(whole)
    assert first.model is second.model is whole.model
    assert first.data is whole.data


def test_an_id_is_the_same_in_every_process() -> None:
    trials = expand(load_experiment(EXPERIMENTS / "quickstart.yaml"))
    assert all(re.fullmatch(rf"{trial.method.name}-[0-9a-f]{{8}}", trial.trial_id) for trial in trials)
    code = (
        "import sys; from loragrid.trials.load import load_experiment; from loragrid.trials.expand import expand;"
        "print(*[trial.trial_id for trial in expand(load_experiment(sys.argv[1]))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXPERIMENTS / "quickstart.yaml")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.split() == [trial.trial_id for trial in trials], done.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "m", "revision": "abc"}},
        {"model": {"name": "m", "dtype": "float32"}},
        {"data": {"name": "d", "num_eval": 63}},
        {"data": {"name": "d", "columns": {"text": "body"}}},
        {"training": {"steps": 21}},
        {"training": {"steps": 20, "batch_size": 4}},
        {"training": {"steps": 20, "beta2": 0.99}},
        {"methods": [{"name": "lora", "rank": 9}]},
        {"methods": [{"name": "lora", "target_modules": ["q", "v"]}]},
        {"methods": [{"name": "lora", "target_modules": "q,v"}]},
        {"methods": [{"name": "lora", "weight_decay": 0.1}]},
        {"methods": ["lora_fa"]},
        {"grid": {"seed": [1]}},
    ],
)
def test_whatever_changes_the_result_changes_the_id(changes: Mapping[str, Any]) -> None:
    (plain,), (changed,) = expand(experiment()), expand(experiment(**changes))
    assert plain.trial_id != changed.trial_id


def test_a_module_list_and_an_equal_pattern_are_two_trials() -> None:
    one, two = expand(experiment(grid={"method.target_modules": [["q", "v"], "q,v"]}))
    assert one.trial_id != two.trial_id


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "y", "question": "Why?"},
        {"training": {"steps": 20, "eval_every": 5, "report_every": 2, "checkpoint_every": 7}},
        {"training": {"steps": 20, "loss_threshold": 2.0, "measure_steps": 0}},
        {"training": {"steps": 20, "micro_batch_size": 2}},
        {"methods": [{"name": "lora", "rank": 8, "alpha": 16}]},
        {"methods": [{"name": "lora", "lr": 0.001}]},
        {"workers": {"num_workers": 2}, "pack": {"max_members": 1}, "storage": {"path": "elsewhere"}},
        {"grid": {"seed": [0]}},
    ],
)
def test_what_does_not_change_the_result_leaves_the_id(changes: Mapping[str, Any]) -> None:
    (plain,), (changed,) = expand(experiment()), expand(experiment(**changes))
    assert plain.trial_id == changed.trial_id


def test_extending_a_grid_keeps_existing_ids() -> None:
    before = expand(experiment(grid={"method.rank": [4], "seed": [0]}))
    after = expand(experiment(methods=["vera", "lora"], grid={"method.rank": [2, 4], "seed": [0, 1]}))
    assert {trial.trial_id for trial in before} < {trial.trial_id for trial in after}


def test_parameters_are_flat_and_named_by_their_yaml_path() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    (trial,) = expand(experiment(data={"name": "d", "columns": columns}))
    parameters = trial.parameters()
    assert parameters["method.name"] == "lora"
    assert parameters["method.target_modules"] == "all-linear"
    assert parameters["training.steps"] == 20
    assert parameters["model.revision"] is None
    assert parameters["data.columns.prompt"] == "question"
    assert all(isinstance(value, str | int | float | bool | None) for value in parameters.values())


def test_an_impossible_combination_is_refused_naming_where_the_value_stands() -> None:
    with pytest.raises(ExperimentError, match=r"^x\.yaml: training\.warmup_steps: 30: longer than the training of 20"):
        experiment(training={"steps": 40, "warmup_steps": 30}, grid={"training.steps": [40, 20]})
    with pytest.raises(ExperimentError, match=r"^x\.yaml: methods\.0\.warmup_steps: 30: longer than"):
        experiment(methods=[{"name": "lora", "warmup_steps": 30}])
    with pytest.raises(
        ExperimentError, match=r"^x\.yaml: methods\.0\.grid\.dropout: 1\.0: .*allowed: 0 <= dropout < 1"
    ):
        experiment(methods=[{"name": "lora", "grid": {"dropout": [0.0, 1.0]}}])
    with pytest.raises(ExperimentError, match=r"^x\.yaml: grid\.method\.rank: -1: "):
        experiment(grid={"method.rank": [1, -1]})
    with pytest.raises(ExperimentError, match=r"workers\.num_workers: 4: cannot share the 6 rows"):
        experiment(workers={"num_workers": 4}, grid={"training.batch_size": [8, 6]}, training={"steps": 20})
    with pytest.raises(
        ExperimentError,
        match=r"training\.micro_batch_size: 4: cannot cut the 6 rows .*allowed: a divisor of 6, or null$",
    ):
        experiment(grid={"training.batch_size": [8, 6]}, training={"steps": 20, "micro_batch_size": 4})


def test_a_users_point_is_the_grids_trial() -> None:
    whole = experiment(
        methods=["lora", "vera"], grid={"method.rank": [4, 8], "seed": [0, 1], "training.lr": [0.1, 0.2]}
    )
    axes = {"method.name": "vera", "method.rank": 8, "training.lr": 0.2, "seed": 1}
    assert trial_from_axes(whole, axes) in expand(whole)


def test_a_point_with_an_indivisible_batch_is_refused() -> None:
    whole = experiment(workers={"num_workers": 2}, training={"steps": 20, "micro_batch_size": 4})
    assert trial_from_axes(whole, {"training.batch_size": 16}).training.micro_batch_size == 4
    with pytest.raises(ExperimentError, match=r"^training\.micro_batch_size: 4: cannot cut the 6 rows"):
        trial_from_axes(whole, {"training.batch_size": 12})
    with pytest.raises(ExperimentError, match=r"^workers\.num_workers: 2: cannot share the 9 rows"):
        trial_from_axes(whole, {"training.batch_size": 9})
    with pytest.raises(ExperimentError, match=r"^training\.micro_batch_size: 2: unknown axis"):
        trial_from_axes(whole, {"training.micro_batch_size": 2})


def test_a_point_goes_before_what_the_experiment_fixes() -> None:
    whole = experiment(methods=[{"name": "lora", "rank": 4, "lr": 0.1}], grid={"seed": [3]})
    trial = trial_from_axes(whole, {"method.rank": np.int64(16), "training.lr": np.float64(0.5)})
    assert table([trial], "method.rank", "training.lr", "seed") == [(16, 0.5, 3)]
    assert type(trial.parameters()["method.rank"]) is int
    assert trial == trial_from_axes(experiment(), {"method.rank": 16, "training.lr": 0.5, "seed": 3})


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        ({}, 'method.name: ["lora", "vera"]: 2 blocks of the experiment could be meant'),
        ({"method.name": "lroa"}, "method.name: \"lroa\": unknown method of this experiment, did you mean 'lora'"),
        ({"method.name": "lora"}, "seed: is an axis of the experiment and has no value here; allowed: 0, 1"),
        ({"method.name": "lora", "seed": 0, "rank": 3}, "rank: 3: unknown axis of lora, did you mean 'method.rank'"),
        ({"method.name": "vera", "seed": 0, "method.alpha": 3}, "method.alpha: 3: unknown axis of vera"),
        ({"method.name": "lora", "seed": 0, "method.rank": 0}, "method.rank: 0: is not allowed"),
        ({"method.name": "lora", "seed": 0, "method.rank": 1.5}, "method.rank: 1.5: is not allowed"),
        ({"method.name": "lora", "seed": 0, "training.lr": float("nan")}, "training.lr: NaN: is not allowed"),
        ({"method.name": "lora", "seed": -1}, "seed: -1: is not allowed"),
        ({"method.name": "lora", "seed": 0, "training.eval_every": 3}, "training.eval_every: 3: unknown axis"),
    ],
)
def test_a_point_that_is_no_single_trial_is_refused(axes: Mapping[str, Any], complaint: str) -> None:
    whole = experiment(methods=["lora", "vera"], grid={"seed": [0, 1]})
    with pytest.raises(ExperimentError) as caught:
        trial_from_axes(whole, axes)
    assert str(caught.value).startswith(complaint)


def test_the_quickstart_compares_the_five_methods_in_twelve_trials() -> None:
    trials = expand(load_experiment(EXPERIMENTS / "quickstart.yaml"))
    assert table(trials, "method.name", "method.rank", "method.lr_ratio", "training.lr") == [
        ("lora", 4, None, 1e-3),
        ("lora", 16, None, 1e-3),
        ("lora_fa", 4, None, 1e-3),
        ("lora_fa", 16, None, 1e-3),
        ("vera", 64, None, 1e-2),
        ("vera", 256, None, 1e-2),
        ("delta_lora", 4, None, 1e-3),
        ("delta_lora", 16, None, 1e-3),
        ("lora_plus", 4, 4.0, 1e-3),
        ("lora_plus", 16, 4.0, 1e-3),
        ("lora_plus", 4, 16.0, 1e-3),
        ("lora_plus", 16, 16.0, 1e-3),
    ]
    delta = next(trial for trial in trials if trial.method.name == "delta_lora")
    # W moves after steps 5 to 10. Float32: bfloat16 would take two CPUs without it many times as long.
    assert (delta.parameters()["method.start_step"], delta.training.steps) == (3, 10)
    assert delta.model.dtype == "float32"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_of_the_project_expands(path: Path) -> None:
    trials = expand(load_experiment(path))
    assert len(trials) >= 12
    assert len({trial.trial_id for trial in trials}) == len(trials)


def test_a_label_is_no_part_of_a_trials_identity() -> None:
    def trials(**block: Any) -> list[Trial]:
        return expand(experiment(methods=[{"name": "lora", "rslora": True, **block}]))

    (plain,), (labelled,) = trials(), trials(label="rsLoRA")
    assert (plain.label, labelled.label) == ("", "rsLoRA")
    assert labelled.trial_id == plain.trial_id == plain.run_name
    assert labelled.run_name == plain.run_name.replace("lora-", "rsLoRA-")
    assert labelled.parameters() == plain.parameters()


@pytest.mark.parametrize("label", ["vera", "<b>", "", 7, "a\nb", "x" * 41])
def test_a_misleading_or_unprintable_label_is_refused(label: object) -> None:
    with pytest.raises(ValueError, match=r"methods\.0\.label: .*allowed: "):
        experiment(methods=[{"name": "lora", "label": label}])


def test_one_label_for_two_methods_is_refused() -> None:
    blocks = [{"name": "lora", "label": "own"}, {"name": "lora_fa", "label": "own"}]
    with pytest.raises(ValueError, match=r"methods\.1\.label: .*lora's label already.*allowed: one method"):
        experiment(methods=blocks)
    twice = [{"name": "lora", "label": "mine", "rank": rank} for rank in (4, 8)]
    assert {trial.label for trial in expand(experiment(methods=twice))} == {"mine"}


def test_layer_numbers_can_be_an_axis_and_are_recorded_if_set() -> None:
    trials = expand(experiment(grid={"method.layers_to_transform": [None, 3, [0, 1]]}))
    recorded = [trial.parameters().get("method.layers_to_transform", "unset") for trial in trials]
    assert recorded[:: len(trials) // 3] == ["unset", 3, "0,1"]
    assert len({trial.setting_id for trial in trials}) == 3


def test_unset_limits_of_targets_leave_trial_ids_as_they_were() -> None:
    (trial, *_) = expand(experiment())
    assert not {"method.layers_to_transform", "method.layers_pattern", "method.exclude_modules"} & {*trial.parameters()}
    assert trial.method.hyperparameters()["exclude_modules"] is None
