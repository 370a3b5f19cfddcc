"""A plan shows the trials that will confirm, with the time and memory of the most expensive settings."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loragrid.cli.plan_table import render_plan
from loragrid.config.experiment import EngineConfig
from loragrid.planning.placement import Node, Placement, place
from loragrid.planning.plan import Plan, most_expensive, plan, plan_confirmation
from loragrid.planning.queues import cut_for
from loragrid.planning.time_estimate import estimate_time
from loragrid.planning.timing import PackTiming, pack_shape
from loragrid.sweep.forecast import too_large
from loragrid.sweep.timing_history import known_timings
from loragrid.trials.load import experiment_from_mapping

ON_ONE_CPU = Placement(num_workers=1, cpus_per_worker=1.0, use_gpu=False, num_packs=1)


@pytest.fixture
def make_plan(tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Plan:
        mapping: dict[str, Any] = {
            "name": "planned",
            "model": {"name": str(tiny_gpt2_dir), "dtype": "float32"},
            "data": {"name": str(chat_jsonl), "max_length": 64, "num_eval": 8},
            "training": {"steps": 9, "batch_size": 4},
            "methods": [{"name": "lora", "grid": {"rank": [2, 8], "lr": [1e-3, 1e-2]}}, "vera", "frozen"],
            "grid": {"seed": [0, 1]},
            "confirm": {"seeds": 3},
            "storage": {"path": str(tmp_path)},
        }
        return plan(experiment_from_mapping(mapping | changes, "planned.yaml"))

    return make


def shown(the_plan: Plan) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(render_plan(the_plan, estimate_time(the_plan, ON_ONE_CPU, {})))
    return text.getvalue()


def test_each_method_that_trains_is_confirmed_once(make_plan: Any) -> None:
    the_plan = make_plan()
    lora, vera = most_expensive(the_plan)
    assert (lora.method.name, lora.method.hyperparameters()["rank"]) == ("lora", 8)
    assert vera.method.name == "vera"
    confirm = the_plan.confirm
    assert [(trial.method.name, trial.seed) for trial in confirm.trials] == [
        (method, seed) for method in ("lora", "vera") for seed in (2, 3, 4)
    ]
    assert {pack.pack_id for pack in confirm.packs} == {"confirm-000"}
    assert {pack.pack_id for pack in the_plan.packs} == {"pack-000"}
    assert make_plan(confirm=None).confirm is None
    assert make_plan(methods=["frozen"]).confirm is None


def test_longer_training_is_dearer_than_more_parameters(make_plan: Any) -> None:
    methods = [{"name": "lora", "rank": 8}]
    grid = {"training.steps": [9, 18], "seed": [0]}
    assert [trial.training.steps for trial in most_expensive(make_plan(methods=methods, grid=grid))] == [18]


def test_labels_and_tasks_are_confirmed_apart(make_plan: Any) -> None:
    methods = ["lora", {"name": "lora", "label": "rslora", "rslora": True}]
    grid = {"data.max_length": [32, 64]}
    chosen = most_expensive(make_plan(methods=methods, grid=grid))
    assert [(trial.label, trial.data.max_length) for trial in chosen] == [
        ("", 32),
        ("", 64),
        ("rslora", 32),
        ("rslora", 64),
    ]


def test_no_trial_that_confirms_is_stopped_early(make_plan: Any) -> None:
    the_plan = make_plan(early_stopping={"grace_steps": 3})
    assert the_plan.experiment.early_stopping is not None
    assert the_plan.confirm.experiment.early_stopping is None
    found = plan_confirmation(the_plan, [the_plan.trials[0]], (5, 6, 7))
    assert found.experiment.early_stopping is None
    assert set(found.counts) == {trial.trial_id for trial in found.trials}
    assert set(found.counts.values()) == {the_plan.counts[the_plan.trials[0].trial_id]}


def test_packs_that_confirm_are_cut_for_gpus_too(make_plan: Any) -> None:
    the_plan = make_plan()
    cut = cut_for(the_plan, place(the_plan.experiment.workers, [Node(num_cpus=8, num_gpus=3)]))
    assert cut.confirm is not None
    assert [pack.pack_id for pack in cut.confirm.packs] == ["confirm-000", "confirm-001", "confirm-002"]


def test_the_plan_says_what_confirming_costs_at_most(make_plan: Any) -> None:
    text = shown(make_plan())
    assert (
        "confirm: 2 chosen settings x 3 fresh seeds (2, 3, 4) = 6 trials more in 1 pack, at most 13,824 tokens" in text
    )
    assert "memory on a GPU, confirm-000 (6 trials): about" in text
    assert "then, to confirm: 1 pack, at most 1 one after another; time not known (no timing of its shape)" in text
    assert "confirm" not in shown(make_plan(confirm=None))


def test_the_json_has_the_trials_that_confirm(make_plan: Any) -> None:
    found = json.loads(json.dumps(make_plan().to_dict()))["confirm_at_most"]
    assert [trial["parameters"]["seed"] for trial in found["trials"]] == [2, 3, 4] * 2
    assert found["gpu_memory_bytes"]["confirm-000"]["total"] > 0
    assert make_plan(confirm=None).to_dict()["confirm_at_most"] is None


def test_the_time_of_a_sweep_includes_what_confirms(make_plan: Any) -> None:
    the_plan = make_plan()
    engine = EngineConfig()
    timings = {
        pack_shape(pack.trials, engine): PackTiming(source="calibrated", step=seconds)
        for phase, seconds in zip(the_plan.phases, (1.0, 10.0), strict=True)
        for pack in phase.packs
    }
    found = estimate_time(the_plan, ON_ONE_CPU, timings)
    assert found.confirm is not None
    assert (found.total_seconds, found.confirm.total_seconds, found.sweep_seconds) == (9.0, 90.0, 99.0)
    assert found.sentences()[-1] == "then, to confirm: 1 pack, at most 1 one after another; at most about 90 s"
    assert found.to_dict()["confirm"] == found.confirm.to_dict()
    (grid, *_) = [pack_shape(pack.trials, engine) for pack in the_plan.packs]
    unknown = estimate_time(the_plan, ON_ONE_CPU, {grid: timings[grid]})
    assert (unknown.total_seconds, unknown.sweep_seconds) == (9.0, None)


def test_timings_and_memory_are_looked_up_for_both_phases(make_plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    the_plan = make_plan()
    wanted = {pack_shape(pack.trials, EngineConfig()) for phase in the_plan.phases for pack in phase.packs}
    asked: list[set[str]] = []

    def recorded(uri: str, device: str, shapes: dict[str, Any]) -> dict[str, Any]:
        asked.append(set(shapes))
        return {}

    monkeypatch.setattr("loragrid.sweep.timing_history.recorded_timings", recorded)
    known_timings(the_plan, ON_ONE_CPU)
    assert asked == [wanted]
    assert [line.partition(" ")[0] for line in too_large(the_plan, 1)] == ["pack-000", "confirm-000"]
