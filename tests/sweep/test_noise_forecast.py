"""What `loragrid plan` says before a sweep: the noise floor, from a recorded sweep of this base and task or a prior."""

import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import loragrid as lg
from loragrid.cli.plan_table import render_plan
from loragrid.comparison.noise_floor import Design, Noise, smallest_difference
from loragrid.planning.plan import Plan, plan
from loragrid.sweep.noise_forecast import LOSS_PRIOR, PROPORTION_PRIOR, NoiseForecast, forecast_noise
from loragrid.sweep.noise_history import noise_metrics, recorded_noise
from loragrid.sweep.record import sweep_parameters
from loragrid.sweep.summary import SweepCost, record_summary
from loragrid.tasks.contract import ACCURACY, Figure
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import default_tracking_uri
from loragrid.trials.metrics import sweep_metrics
from tests.support.recorded_sweeps import write_scores

ANSWERS = {"kind": "exact_match"}


@dataclass(frozen=True, kw_only=True)
class Mean:
    mean: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """The measured noise of a sweep of three methods."""

    seed_deviation: float = 0.002
    row_deviation: float = 0.015
    row_seed_deviation: float = 0.012
    effective_groups: float = 200.0
    num_seeds: int = 3
    num_rows: int = 256
    estimates: tuple[Mean, ...] = (Mean(mean=0.6), Mean(mean=0.7), Mean(mean=0.8))


@pytest.fixture
def keys(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "floor",
        "model": {"name": str(tiny_llama_dir), "dtype": "float32"},
        "data": {"name": str(chat_jsonl), "max_length": 96, "num_eval": 8, "num_test": 40},
        "training": {"steps": 3, "batch_size": 4},
        "methods": ["lora", "lora_fa", "lora_plus", "frozen"],
        "grid": {"seed": [0, 1, 2]},
        "storage": {"path": str(tmp_path / "store")},
    }


def planned(keys: dict[str, Any], **changes: Any) -> Plan:
    return plan(lg.experiment_from_mapping(keys | changes, "floor.yaml"))


def record(keys: dict[str, Any], result: Result, **changes: Any) -> str:
    """Records a sweep of this experiment whose run holds the metrics of `result`; returns the sweep's name."""
    experiment = lg.experiment_from_mapping(keys | changes, "floor.yaml")
    recorder = Recorder(experiment.name, default_tracking_uri(experiment.storage.path, None))
    name = recorder.next_sweep_name()
    recorder.start_sweep(name, sweep_parameters(experiment), {})
    recorder.log_sweep_summary(noise_metrics(result), {})
    recorder.end_sweep("FINISHED")
    return name


def forecast(design: Design, num_test: int = 256, **changes: Any) -> NoiseForecast:
    noise = Noise(seed_deviation=0.002, pair_row_deviation=0.011, row_seed_deviation=0.012)
    known = {"model": "m", "data": "d", "figure": None, "level": 0.67, "noise": noise, "source": "sweep a-1"}
    return NoiseForecast(**(known | changes), design=design, num_test=num_test)


FIVE = Design(num_methods=5, num_pairs=10, num_seeds=3, num_groups=256.0)


def test_floor_is_said_with_seeds_rows_and_pairs() -> None:
    first, second = forecast(FIVE).sentences()
    assert first == (
        "noise floor: 3 seeds and 256 test rows can show differences of about 0.0096 (1.4 % of the loss) between "
        "5 methods (10 pairs), with noise as in sweep a-1"
    )
    assert second == "1 % of the loss: about 5 seeds would show it, or 4 seeds with many more test rows"


def test_few_seeds_make_no_claim_but_three_could() -> None:
    for num_seeds, words in ((1, "1 seed"), (2, "2 seeds")):
        first, second = forecast(replace(FIVE, num_seeds=num_seeds)).sentences()
        assert first == (
            f"noise floor: with {words} no claim about methods is possible; 3 seeds could show differences of about "
            "0.0096 (1.4 % of the loss), with noise as in sweep a-1"
        )
        assert second.startswith("1 % of the loss: about 5 seeds")


def test_no_test_rows_and_too_few_make_no_claim() -> None:
    (none,) = forecast(replace(FIVE, num_groups=0.0), num_test=0).sentences()
    assert none == "noise floor: no claim about methods is possible without test rows (data.num_test)"
    (few,) = forecast(replace(FIVE, num_groups=8.0), num_test=8).sentences()
    assert few == "noise floor: no claim about methods is possible with 8 test rows (data.num_test); 10 is the least"


def test_more_rows_are_proposed_only_where_they_help() -> None:
    quiet_rows = Noise(seed_deviation=0.003, pair_row_deviation=0.0001, row_seed_deviation=0.0)
    assert forecast(FIVE, noise=quiet_rows).sentences()[1].endswith("; more test rows would not help")
    noisy_rows = Noise(seed_deviation=0.0001, pair_row_deviation=0.2, row_seed_deviation=0.0)
    assert forecast(FIVE, noise=noisy_rows).sentences()[1] == (
        "1 % of the loss: 50 seeds would not show it with these test rows, but 3 seeds with many more test rows would"
    )
    noisy_seeds = Noise(seed_deviation=0.2, pair_row_deviation=0.0, row_seed_deviation=0.0)
    assert forecast(FIVE, noise=noisy_seeds).sentences()[1] == (
        "1 % of the loss: not even 50 seeds would show it, with any number of test rows"
    )
    assert forecast(replace(FIVE, num_seeds=9)).sentences()[1] == "1 % of the loss: these seeds can show it"


def test_accuracy_is_said_in_points() -> None:
    first, second = forecast(FIVE, figure=ACCURACY, level=0.4, noise=PROPORTION_PRIOR).sentences()
    assert "can show differences of about 11 points of accuracy between" in first
    assert second.startswith("one point: ")
    own = Figure(name="edits", description="", axis="", higher_is_better=False)
    assert forecast(FIVE, figure=own).sentences()[1].startswith("1 % of the edits: ")


def test_plan_without_a_store_uses_the_stated_prior(keys: dict[str, Any], tmp_path: Path) -> None:
    (loss,) = forecast_noise(planned(keys))
    assert (loss.noise, loss.level, loss.figure) == (LOSS_PRIOR, None, None)
    assert loss.design == Design(num_methods=3, num_pairs=3, num_seeds=3, num_groups=40.0), "frozen is a reference"
    assert loss.difference == smallest_difference(LOSS_PRIOR, loss.design)
    assert "% of the loss between 3 methods (3 pairs), with noise as in the published GSM8K" in loss.sentences()[0]
    (accuracy,) = forecast_noise(planned(keys, task=ANSWERS))
    assert (accuracy.noise, accuracy.figure) == (PROPORTION_PRIOR, ACCURACY)
    assert "noise as in answers of which half are right" in accuracy.sentences()[0]
    assert not (tmp_path / "store").exists()


def test_latest_sweep_of_the_same_base_and_task_gives_the_noise(keys: dict[str, Any]) -> None:
    record(keys, Result(seed_deviation=0.5))
    name = record(keys, Result())
    record(keys, Result(seed_deviation=0.7), task=ANSWERS)
    record(keys | {"name": "other"}, Result(seed_deviation=0.8), data=keys["data"] | {"name": "elsewhere.jsonl"})
    record(keys | {"name": "other"}, Result(seed_deviation=0.9), model={"name": "another"})
    record(keys, Result(num_seeds=1))
    (found,) = forecast_noise(planned(keys))
    expected = Noise.measured(seed_deviation=0.002, row_deviation=0.015, row_seed_deviation=0.012, num_seeds=3)
    assert found.noise == expected
    assert found.source == f"sweep {name}"
    assert found.level == pytest.approx(0.7)
    assert found.design.num_groups == pytest.approx(40 * 200 / 256), "planned rows have groups as the recorded ones"
    (with_task,) = forecast_noise(planned(keys, task=ANSWERS))
    assert with_task.noise.seed_deviation == 0.7


def test_sweep_with_scores_leaves_its_noise_for_the_next_plan(keys: dict[str, Any], tmp_path: Path) -> None:
    """From the scores of single test rows to the plan's sentence, through MLflow."""
    experiment = lg.experiment_from_mapping(keys, "floor.yaml")
    recorder = Recorder("floor", default_tracking_uri(experiment.storage.path, None))
    recorder.start_sweep("floor-1", sweep_parameters(experiment), {})
    for method in ("lora", "lora_fa"):
        for seed in (0, 1, 2):
            trial = f"{method}-{seed}"
            recorder.start_trial(trial, {"method.name": method, "seed": seed}, {})
            recorder.log_summary(trial, {"eval/final_loss": 1.0, "test/loss": 1.2, "parameters/trainable": 8.0})
            (tmp_path / trial).mkdir()
            write_scores(tmp_path / trial / "test.csv", 1.2 + 0.01 * seed, trial)
            recorder.log_artifacts(trial, tmp_path / trial, "scores")
            recorder.end_trial(trial, "FINISHED")
    record_summary(recorder, "floor-1", SweepCost())
    recorder.end_sweep("FINISHED")
    (found,) = forecast_noise(planned(keys))
    assert found.source == "sweep floor-1"
    assert found.level == pytest.approx(1.21, abs=0.001)
    # `write_scores` draws the rows of every trial with a deviation of 0.02, and adds nothing that depends on the seed.
    assert found.noise.row_seed_deviation == pytest.approx(0.02, rel=0.35)
    assert found.noise.seed_deviation < 0.001
    assert found.design.num_groups == pytest.approx(40.0)


def test_store_without_noise_metrics_falls_back_to_the_prior(keys: dict[str, Any]) -> None:
    experiment = lg.experiment_from_mapping(keys, "floor.yaml")
    recorder = Recorder("floor", default_tracking_uri(experiment.storage.path, None))
    recorder.start_sweep("floor-1", sweep_parameters(experiment), {})
    recorder.log_sweep_summary({"noise/row_deviation": 0.1}, {})
    recorder.end_sweep("FINISHED")
    trial = planned(keys).trials[0]
    assert recorded_noise(trial, experiment.storage.path, None) is None
    assert forecast_noise(planned(keys))[0].noise == LOSS_PRIOR


def test_names_and_stores_that_cannot_be_searched_have_no_noise(keys: dict[str, Any], tmp_path: Path) -> None:
    record(keys, Result())
    trial = planned(keys).trials[0]
    assert recorded_noise(trial, str(tmp_path / "store"), None) is not None
    assert recorded_noise(trial, str(tmp_path / "store"), f"file:{tmp_path}") is None
    quoted = replace(trial, data=trial.data.model_copy(update={"name": "it's.jsonl"}))
    assert recorded_noise(quoted, str(tmp_path / "store"), None) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"num_seeds": 1},
        {"estimates": (Mean(mean=0.6),)},
        {"row_deviation": 0.0},
        {"seed_deviation": math.nan},
    ],
)
def test_sweep_that_cannot_measure_its_noise_records_none(changed: dict[str, Any]) -> None:
    assert noise_metrics(Result(**changed)) == {}


def test_every_noise_metric_is_described() -> None:
    assert noise_metrics(Result()).keys() == {key for key in sweep_metrics() if key.startswith("noise/")}


def test_only_seeds_that_every_method_has_count(keys: dict[str, Any]) -> None:
    the_plan = planned(keys, methods=["lora", "vera"], grid={})
    seeds = {"lora": (0, 1, 2, 3), "vera": (2, 3, 4)}
    trials = [replace(trial, seed=seed) for trial in the_plan.trials for seed in seeds[trial.method.name]]
    (found,) = forecast_noise(replace(the_plan, trials=tuple(trials)))
    assert found.design.num_seeds == 2


def test_planned_contrasts_are_fewer_pairs(keys: dict[str, Any]) -> None:
    (every,) = forecast_noise(planned(keys))
    (planned_ones,) = forecast_noise(planned(keys, verdict={"against": "lora"}))
    assert (every.design.num_pairs, planned_ones.design.num_pairs) == (3, 2)
    assert every.difference is not None
    assert planned_ones.difference is not None
    assert planned_ones.difference < every.difference


def test_verdict_rests_on_the_fresh_seeds(keys: dict[str, Any]) -> None:
    (found,) = forecast_noise(planned(keys, confirm={"seeds": 5}))
    assert found.design.num_seeds == 5
    assert found.sentences()[0].startswith("noise floor: 5 fresh seeds and 40 test rows can show")


def test_one_method_has_nothing_to_compare(keys: dict[str, Any]) -> None:
    assert forecast_noise(planned(keys, methods=["lora", "frozen"])) == []


def test_every_base_and_data_set_has_its_own_line(keys: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path) -> None:
    names = [keys["data"]["name"], str(tmp_path / "other.jsonl")]
    data = {key: value for key, value in keys["data"].items() if key != "name"} | {"name": names[0]}
    the_plan = planned(keys, data=data, grid={"seed": [0, 1, 2], "data.name": names})
    found = forecast_noise(the_plan)
    assert [one.data for one in found] == names
    printed = io.StringIO()
    Console(width=400, file=printed).print(render_plan(the_plan, None, found))
    for name in names:
        assert f"{tiny_llama_dir}, {name}: noise floor: " in printed.getvalue()


def test_plan_prints_the_floor_at_eighty_columns_and_in_json(keys: dict[str, Any]) -> None:
    the_plan = planned(keys)
    found = forecast_noise(the_plan)
    printed = io.StringIO()
    Console(width=80, file=printed).print(render_plan(the_plan, None, found))
    lines = printed.getvalue().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("noise floor: "))
    assert " ".join(line.strip() for line in lines[start : start + 5]).startswith(found[0].sentences()[0])
    assert max(map(len, lines[start : start + 5])) <= 80
    (written,) = [json.loads(json.dumps(one.to_dict(), allow_nan=False)) for one in found]
    assert written["smallest_difference"] == found[0].difference
    assert (written["num_seeds"], written["num_test_rows"], written["num_pairs"]) == (3, 40, 3)
    assert written["metric"] == "test/loss"
    assert written["level"] is None
    assert written["obstacle"] == ""
