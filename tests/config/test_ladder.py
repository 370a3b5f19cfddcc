"""A ladder becomes the values of an axis, with equal ratios from the lowest to the highest."""

import pickle
from typing import Any

import numpy
import pytest
import yaml

from loragrid.comparison.experiment_file import experiment_to_yaml
from loragrid.config.experiment import Experiment
from loragrid.config.ladder import ladder_values
from loragrid.trials.expand import expand
from loragrid.trials.load import experiment_from_mapping

BASE: dict[str, Any] = {
    "name": "ladders",
    "model": {"name": "smollm2-135m-instruct"},
    "data": {"name": "chitchat"},
    "training": {"steps": 2},
}


def rates(experiment: Experiment) -> list[float]:
    return [trial.training.lr for trial in expand(experiment)]


@pytest.mark.parametrize(("low", "high", "points"), [(1e-4, 1e-2, 5), (3e-5, 0.7, 9), (0.001, 0.002, 2)])
def test_a_ladder_is_numpys_geometric_series_with_exact_ends(low: float, high: float, points: int) -> None:
    values = ladder_values("lr", {"ladder": [low, high], "points": points})
    assert (values[0], values[-1], len(values)) == (low, high, points)
    numpy.testing.assert_allclose(values, numpy.geomspace(low, high, points), rtol=5e-4)
    assert all(len(f"{value:.15g}".replace("0.", "").lstrip("0").split("e")[0]) <= 5 for value in values[1:-1])


def test_between_whole_numbers_a_ladder_has_whole_numbers() -> None:
    assert ladder_values("rank", {"ladder": [4, 64], "points": 5}) == [4, 8, 16, 32, 64]


def test_a_ladder_is_written_back_as_a_ladder() -> None:
    ladder = {"ladder": [4, 64], "points": 3}
    mapping = BASE | {
        "methods": ["lora", {"name": "vera", "grid": {"lr": {"ladder": [1, 4], "points": 3}}}],
        "grid": {"method.rank": ladder, "seed": [0, 1]},
    }
    experiment = experiment_from_mapping(mapping, "f.yaml")
    assert experiment.grid["method.rank"] == (4, 16, 64)
    assert experiment.methods[1].grid == {"lr": (1.0, 2.0, 4.0)}
    for copy in (experiment, pickle.loads(pickle.dumps(experiment))):
        content = yaml.safe_load(experiment_to_yaml(copy))
        assert content["grid"] == {"method.rank": ladder, "seed": [0, 1]}
        assert content["methods"][1]["grid"] == {"lr": {"ladder": [1, 4], "points": 3}}
    again = experiment_from_mapping(content, "again")
    assert again == experiment
    assert [trial.trial_id for trial in expand(again)] == [trial.trial_id for trial in expand(experiment)]
    taken_over = Experiment(**{**BASE, "methods": ["lora"]}, grid=experiment.grid)
    assert yaml.safe_load(experiment_to_yaml(taken_over))["grid"]["method.rank"] == ladder


def test_ladders_make_the_same_trials_as_lists() -> None:
    ladder = {"ladder": [1e-4, 1e-2], "points": 3}
    own = experiment_from_mapping(BASE | {"methods": [{"name": "vera", "grid": {"lr": ladder}}]}, "f.yaml")
    for_all = experiment_from_mapping(BASE | {"methods": ["vera"], "grid": {"training.lr": ladder}}, "f.yaml")
    listed = experiment_from_mapping(BASE | {"methods": ["vera"], "grid": {"training.lr": [1e-4, 1e-3, 1e-2]}}, "f")
    assert rates(own) == rates(for_all) == rates(listed) == [1e-4, 1e-3, 1e-2]
    assert (
        [t.trial_id for t in expand(own)]
        == [t.trial_id for t in expand(for_all)]
        == [t.trial_id for t in expand(listed)]
    )


@pytest.mark.parametrize(
    ("ladder", "key"),
    [
        ({"ladder": [1e-2, 1e-4], "points": 3}, r"training\.lr\.ladder"),
        ({"ladder": [0, 1e-4], "points": 3}, r"training\.lr\.ladder"),
        ({"ladder": [1e-4, float("inf")], "points": 3}, r"training\.lr\.ladder"),
        ({"ladder": [1e-4, True], "points": 3}, r"training\.lr\.ladder"),
        ({"ladder": [1e-4], "points": 3}, r"training\.lr\.ladder"),
        ({"points": 3}, r"training\.lr\.ladder"),
        ({"ladder": [1e-4, 1e-2]}, r"training\.lr\.points"),
        ({"ladder": [1e-4, 1e-2], "points": 1}, r"training\.lr\.points"),
        ({"ladder": [1e-4, 1e-2], "points": 10**9}, r"training\.lr\.points"),
        ({"ladder": [1e-4, 1e-2], "points": 2.5}, r"training\.lr\.points"),
        ({"ladder": [1e-4, 1e-2], "steps": 3}, r"training\.lr"),
        ({"ladder": [1, 3], "points": 5}, r"training\.lr"),
    ],
)
def test_an_impossible_ladder_is_refused_with_its_axis(ladder: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"grid\.{key}: .*allowed: "):
        experiment_from_mapping(BASE | {"methods": ["lora"], "grid": {"training.lr": ladder}}, "f.yaml")
    with pytest.raises(ValueError, match=r"methods\.0\.grid\.lr.*: .*allowed: "):
        experiment_from_mapping(BASE | {"methods": [{"name": "lora", "grid": {"lr": ladder}}]}, "f.yaml")
