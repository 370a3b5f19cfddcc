"""LoraGrid's trials in a user's own Tune sweep, with any searcher and scheduler."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray._common.utils import get_ray_address_file

import loragrid as lg
from loragrid.sweep.trainable import queue_at
from loragrid.tracking.store_uri import default_tracking_uri
from tests.support.custom_sweeps import search_with_optuna, stop_early_with_asha

pytestmark = [pytest.mark.end_to_end, pytest.mark.usefixtures("ray_of_two_cpus")]


@pytest.fixture
def make_experiment(
    tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., lg.Experiment]:
    """An experiment named by relative paths; Tune keeps its own files beside it, not in the user's home folder."""
    monkeypatch.setattr("ray.train.constants.DEFAULT_STORAGE_PATH", str(tmp_path / "tune"))
    monkeypatch.chdir(tmp_path)

    def make(**keys: Any) -> lg.Experiment:
        training = {"steps": 8, "batch_size": 4, "eval_every": 2, "measure_steps": 0, **keys.pop("training", {})}
        return lg.Experiment(
            model={"name": os.path.relpath(tiny_llama_dir), "dtype": "float32"},
            data={"name": os.path.relpath(chat_jsonl), "max_length": 96, "num_eval": 8},
            training=training,
            workers={"cpus_per_worker": 1},
            storage={"path": str(tmp_path / "store")},
            **keys,
        )

    return make


@pytest.fixture
def address_of_a_killed_head() -> Iterator[None]:
    """The address that Ray noted down for this machine leads nowhere, as after a `ray start` whose head was killed."""
    noted = Path(get_ray_address_file(None))
    before = noted.read_text() if noted.exists() else None
    noted.write_text("127.0.0.1:1")
    yield
    noted.unlink() if before is None else noted.write_text(before)


def recorded(experiment: lg.Experiment) -> lg.Comparison:
    return lg.load_comparison(experiment.name, default_tracking_uri(experiment.storage.path, None))


def test_optuna_searches_and_every_point_it_tried_is_a_run(
    make_experiment: Callable[..., lg.Experiment], tmp_path: Path
) -> None:
    experiment = make_experiment(name="optuna", methods=["lora_plus"])
    results = search_with_optuna(experiment)
    comparison = recorded(experiment)
    assert results.num_errors == 0
    assert list(comparison.table["status"]) == ["FINISHED"] * 2
    tried = results.get_dataframe()[["config/training.lr", "config/method.lr_ratio"]]
    in_mlflow = comparison.table[["lr", "lr_ratio"]]
    assert sorted(in_mlflow.to_numpy().tolist()) == sorted(tried.to_numpy().tolist())
    best = results.get_best_result().metrics
    assert best is not None
    assert best["eval_loss"] == comparison.table["eval/final_loss"].min()
    lg.write_report(comparison, tmp_path / "report.html")
    assert f"{best['eval_loss']:.4f}" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("address_of_a_killed_head")
def test_asha_stops_a_trial_that_falls_behind(
    make_experiment: Callable[..., lg.Experiment],
) -> None:
    experiment = make_experiment(name="asha", methods=["lora"])
    results = stop_early_with_asha(experiment)
    good, bad = (row for _, row in recorded(experiment).table.sort_values("lr", ascending=False).iterrows())
    assert results.num_errors == 0
    assert (good["lr"], good["status"]) == (1e-2, "FINISHED")
    assert (bad["lr"], bad["status"]) == (1e-6, "KILLED")
    assert bad["reason"] == "stopped early by the sweep's scheduler"
    curves = recorded(experiment).curves
    stopped = curves[(curves["trial_id"] == bad["trial_id"]) & (curves["key"] == "train/loss")]
    assert 2 <= stopped["step"].max() < experiment.training.steps
    until = time.monotonic() + 30
    while free_cpus() < 2.0 and time.monotonic() < until:
        time.sleep(0.2)
    assert free_cpus() == 2.0


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]


def test_a_diverged_trial_counts_as_infinitely_bad(
    make_experiment: Callable[..., lg.Experiment],
) -> None:
    experiment = make_experiment(name="extremes", methods=["lora"], training={"steps": 3})
    tuner = tune.Tuner(
        lg.trainable(experiment),
        param_space={"training.lr": tune.grid_search([1e30, -1.0])},
        tune_config=tune.TuneConfig(metric="eval_loss", mode="min"),
        run_config=tune.RunConfig(callbacks=[lg.recording(experiment)], verbose=0),
    )
    results = tuner.fit()
    diverged, impossible = results[0], results[1]
    assert diverged.error is None
    assert diverged.metrics is not None
    assert diverged.metrics["eval_loss"] == float("inf")
    assert "training.lr" in str(impossible.error)
    table = recorded(experiment).table
    assert list(table["status"]) == ["FAILED"]
    assert table["reason"][0].startswith("diverged")


def test_a_searcher_may_come_to_a_point_twice(make_experiment: Callable[..., lg.Experiment]) -> None:
    experiment = make_experiment(name="twice", methods=["lora"])
    first, second = (queue_at(experiment, {"training.lr": 1e-2}, tune_id).trials[0] for tune_id in ("a", "b"))
    assert first.trial_id != second.trial_id
    assert first.parameters() == second.parameters()
