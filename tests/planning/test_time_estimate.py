"""The expected time of a sweep, computed from timings of real steps and of earlier sweeps."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import loragrid as lg
from loragrid.cli import main as cli
from loragrid.config.experiment import EngineConfig, PackConfig, StorageConfig
from loragrid.planning.placement import Node, Placement
from loragrid.planning.plan import Plan, plan
from loragrid.planning.time_estimate import estimate_time, plan_on
from loragrid.planning.timing import (
    SHAPE_TAG,
    PackTiming,
    num_evaluations,
    pack_shape,
    save_timings,
    saved_timings,
)
from loragrid.sweep.calibration import calibrate
from loragrid.sweep.forecast import too_large
from loragrid.sweep.summary import SweepCost, record_summary
from loragrid.sweep.timing_history import (
    PackKind,
    device_here,
    device_of,
    known_timings,
    recorded_start,
    recorded_timings,
)
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import Scalar, default_tracking_uri
from loragrid.training.step_mode import MODE_TAG
from loragrid.trials.packing import group_into_packs
from loragrid.trials.tags import DEVICE_TAG
from tests.support.small_packs import make_setup


def plan_of(model: Path, rows: Path, *, training: dict[str, Any] | None = None, **sections: Any) -> Plan:
    """Eight trials of LoRA (two ranks), and full fine-tuning with two seeds."""
    return plan(
        lg.Experiment(
            name="timed",
            model={"name": str(model), "dtype": "float32"},
            data={"name": str(rows), "max_length": 96, "num_eval": 8},
            training={"steps": 10, "batch_size": 4, "measure_steps": 1} | (training or {}),
            methods=[{"name": "lora", "grid": {"rank": [2, 4], "lr": [1e-3, 1e-2]}}, "full"],
            grid={"seed": [0, 1]},
            **{"pack": {"max_members": 4}} | sections,
        )
    )


@pytest.fixture
def the_plan(tiny_llama_dir: Path, chat_jsonl: Path) -> Plan:
    return plan_of(tiny_llama_dir, chat_jsonl)


def place_for(num_packs: int) -> Placement:
    return Placement(num_workers=1, cpus_per_worker=1.0, use_gpu=False, num_packs=num_packs)


def timings_of(the_plan: Plan, **fields: Any) -> dict[str, PackTiming]:
    return {
        pack_shape(pack.trials, EngineConfig()): PackTiming(source="calibrated", **fields) for pack in the_plan.packs
    }


def test_only_settings_that_cost_time_change_a_shape(tiny_llama_dir: Path, chat_jsonl: Path) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    one = pack_shape([setup.trial("lora")], EngineConfig())
    assert pack_shape([setup.trial("lora", seed=3, lr=0.5, steps=99)], EngineConfig()) == one
    assert pack_shape([setup.trial("lora_plus")], EngineConfig()) == one, "LoRA+ is LoRA with other learning rates"
    others = [
        [setup.trial("lora", {"rank": 9})],
        [setup.trial("lora", batch_size=8)],
        [setup.trial("lora", micro_batch_size=2)],
        [setup.trial("lora", activation_checkpointing=True)],
        [setup.trial("vera")],
        [setup.trial("lora"), setup.trial("lora", seed=1)],
    ]
    shapes = {pack_shape(trials, EngineConfig()) for trials in others}
    shapes.add(pack_shape([setup.trial("lora")], EngineConfig(mode="eager")))
    shapes.add(pack_shape([setup.trial("lora")], EngineConfig(deterministic=True)))
    shapes |= {pack_shape([setup.trial("lora")], EngineConfig(), 2, shard=shard) for shard in (False, True)}
    assert len(shapes | {one}) == len(others) + 5


@pytest.mark.parametrize(("steps", "every", "expected"), [(10, None, 1.5), (10, 5, 2.5), (10, 4, 3.5), (3, 7, 1.5)])
def test_evaluations_are_counted_as_the_loop_makes_them(steps: int, every: int | None, expected: float) -> None:
    assert num_evaluations(steps, every, 2) == expected
    assert num_evaluations(steps, every, 2, 0.25) == expected + 0.25


def test_only_packs_on_one_place_add_up(the_plan: Plan) -> None:
    assert [len(pack.trials) for pack in the_plan.packs] == [4, 4, 1, 1]
    timings = timings_of(the_plan, step=1.0)
    one = estimate_time(the_plan, place_for(1), timings)
    assert (one.total_seconds, one.num_waves) == (40.0, 4)
    assert set(one.pack_seconds.values()) == {10.0}
    four = estimate_time(the_plan, place_for(4), timings)
    assert (four.total_seconds, four.num_waves) == (10.0, 1)


def test_every_queue_starts_its_workers_once(the_plan: Plan) -> None:
    timings = timings_of(the_plan, step=1.0)
    assert estimate_time(the_plan, place_for(1), timings, 20.0).total_seconds == 60.0
    estimate = estimate_time(the_plan, place_for(4), timings, 20.0)
    assert estimate.total_seconds == 30.0
    assert "starting Ray" not in estimate.excluded
    assert "starting Ray" in estimate_time(the_plan, place_for(4), timings).excluded


def test_the_start_time_comes_from_the_stores_latest_sweep(the_plan: Plan, tmp_path: Path) -> None:
    storage = the_plan.experiment.storage.model_copy(update={"path": str(tmp_path)})
    planned = replace(the_plan, experiment=the_plan.experiment.model_copy(update={"storage": storage}))
    assert recorded_start(planned) is None
    for number, seconds in enumerate((30.0, 20.0)):
        recorder = Recorder("started", default_tracking_uri(str(tmp_path), None))
        recorder.start_sweep(f"started-{number}", {}, {})
        recorder.start_trial(f"lora-{number}", {"method.name": "lora"}, {})
        recorder.end_trial(f"lora-{number}", "FAILED")
        times = iter((0.0, 5.0, 5.0 + seconds, 90.0))
        cost = SweepCost(clock=lambda times=times: next(times))  # type: ignore[misc]
        cost.queue_started("a")
        cost.queue_reported("a")
        cost.queue_reported("a")
        record_summary(recorder, f"started-{number}", cost)
        recorder.end_sweep("FAILED")
    assert recorded_start(planned) == 20.0


def test_the_base_is_reloaded_after_a_method_writes_it(the_plan: Plan) -> None:
    estimate = estimate_time(the_plan, place_for(1), timings_of(the_plan, load=100.0, step=1.0))
    assert list(estimate.pack_seconds.values()) == [110.0, 10.0, 10.0, 110.0]


def test_a_shape_is_measured_alone_once_by_the_same_workers(the_plan: Plan) -> None:
    estimate = estimate_time(the_plan, place_for(1), timings_of(the_plan, measure=8.0, step=1.0))
    assert list(estimate.pack_seconds.values()) == [18.0, 18.0, 18.0, 10.0]  # rank 2, rank 4, full, full again


def test_unknown_packs_are_named_and_the_total_is_not_guessed(the_plan: Plan) -> None:
    timings = timings_of(the_plan, step=1.0)
    full = pack_shape(the_plan.packs[-1].trials, EngineConfig())
    estimate = estimate_time(the_plan, place_for(1), {**timings, full: PackTiming(source="c", problem="does not fit")})
    assert estimate.total_seconds is None
    assert estimate.unknown == {"pack-002": "does not fit", "pack-003": "does not fit"}
    assert "does not fit: pack-002, pack-003" in estimate.sentences()
    nothing = estimate_time(the_plan, place_for(1), {})
    assert nothing.total_seconds is None
    assert any("--calibrate" in sentence for sentence in nothing.sentences())


def test_a_machine_without_a_place_for_a_pack_says_so(tiny_llama_dir: Path, chat_jsonl: Path) -> None:
    workers = {"num_workers": 4, "cpus_per_worker": 4}
    here, placement = plan_on(plan_of(tiny_llama_dir, chat_jsonl, workers=workers), Node(num_cpus=2, num_gpus=0))
    estimate = estimate_time(here, placement, {})
    assert estimate.total_seconds is None
    assert "no place" in estimate.sentences()[0]


def test_a_calibration_times_every_shape_once(tiny_llama_dir: Path, chat_jsonl: Path, the_plan: Plan) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    rows = {(trial.model, trial.data): setup.rows for trial in the_plan.trials}
    said: list[str] = []
    timings = calibrate(
        the_plan.packs, rows, torch.device("cpu"), engine=EngineConfig(), budget_seconds=60.0, say=said.append
    )
    assert timings.keys() == {pack_shape(pack.trials, EngineConfig()) for pack in the_plan.packs}
    assert len(said) == len(timings) == 3, "two packs of full fine-tuning are of one shape"
    for timing in timings.values():
        assert min(timing.load, timing.setup, timing.step, timing.evaluation, timing.measure) > 0.0
        assert timing.step < 5.0
    assert estimate_time(the_plan, place_for(1), timings).total_seconds is not None


def test_a_calibration_without_time_left_times_the_largest_pack(
    tiny_llama_dir: Path, chat_jsonl: Path, the_plan: Plan
) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    rows = {(trial.model, trial.data): setup.rows for trial in the_plan.trials}
    said: list[str] = []
    timings = calibrate(
        the_plan.packs, rows, torch.device("cpu"), engine=EngineConfig(), budget_seconds=0.0, say=said.append
    )
    (shape,) = timings
    assert shape in {pack_shape(pack.trials, EngineConfig()) for pack in the_plan.packs if len(pack.trials) == 4}
    assert said[-1] == "no time left for 2 of 3 shapes of packs"


def test_calibrations_are_kept_by_device_and_shape(tmp_path: Path) -> None:
    save_timings(tmp_path, "this", {"a": PackTiming(source="calibrated", step=1.0)})
    save_timings(tmp_path, "this", {"b": PackTiming(source="calibrated", step=2.0)})
    save_timings(tmp_path, "that", {"a": PackTiming(source="calibrated", step=3.0)})
    assert {shape: timing.step for shape, timing in saved_timings(tmp_path, "this").items()} == {"a": 1.0, "b": 2.0}
    assert saved_timings(tmp_path, "that")["a"].step == 3.0
    assert saved_timings(tmp_path / "nowhere", "this") == {}


def test_timings_of_the_expected_mode_come_before_others(
    the_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = the_plan.experiment.model_copy(update={"storage": StorageConfig(path=str(tmp_path))})
    the_plan, place = replace(the_plan, experiment=experiment), place_for(1)  # without a GPU steps are eager
    shapes = timings_of(the_plan)

    def known(calibrated: str, recorded: str) -> set[str]:
        save_timings(tmp_path, device_here(place), timings_of(the_plan, mode=calibrated))
        monkeypatch.setattr(
            "loragrid.sweep.timing_history.recorded_timings",
            lambda uri, device, kinds: {shape: PackTiming(source="sweep", mode=recorded) for shape in kinds},
        )
        found = known_timings(the_plan, place)
        assert found.keys() == shapes.keys()
        return {timing.source for timing in found.values()}

    assert known("eager", "eager") == {"calibrated"}
    assert known("graph", "eager") == {"sweep"}
    assert known("graph", "graph") == {"calibrated"}


def test_recorded_timings_hold_for_their_shape_and_device_only(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    recorder = Recorder("before", uri)
    recorder.start_sweep("before-1", {}, {})
    tags = {SHAPE_TAG: "a-shape", MODE_TAG: "graph", DEVICE_TAG: "NVIDIA H200", "loragrid.threads": "8"}
    kind = PackKind(num_members=1, num_shapes=1, mode="graph")
    settings: dict[str, Scalar] = {"training.steps": 10, "data.num_eval": 8, "data.num_test": 16}
    recorder.start_trial("lora-0", {"method.name": "lora", "training.eval_every": 4, **settings}, tags)
    seconds = {"setup": 7.0, "measure": 3.0, "data": 1.0, "train": 19.0, "eval": 6.0}
    recorder.log_summary("lora-0", {f"time/{phase}_seconds": value for phase, value in seconds.items()})
    recorder.end_trial("lora-0", "FINISHED")
    recorder.start_trial("lora-1", {"method.name": "lora", "training.steps": 10}, tags)
    recorder.end_trial("lora-1", "FAILED", "it has no times")
    recorder.end_sweep("FAILED")
    found = recorded_timings(uri, device_of(tags), {"a-shape": kind, "another": replace(kind, num_members=2)})
    timing = PackTiming(source="sweep before-1", mode="graph", setup=7.0, measure=3.0, step=2.0, evaluation=1.0)
    assert found == {"a-shape": timing}
    assert recorded_timings(uri, device_of(tags | {DEVICE_TAG: "NVIDIA H100"}), {"a-shape": kind}) == {}
    assert recorded_timings(default_tracking_uri(str(tmp_path / "nowhere"), None), "", {"a-shape": kind}) == {}
    # From trials that ran in the requested mode, if there are any.
    assert recorded_timings(uri, device_of(tags), {"a-shape": replace(kind, mode="compiled")}) == {"a-shape": timing}
    recorder.start_sweep("before-2", {}, {})
    recorder.start_trial(
        "lora-2", {"method.name": "lora", "training.eval_every": 4, **settings}, tags | {MODE_TAG: "compiled"}
    )
    recorder.log_summary("lora-2", {f"time/{phase}_seconds": value for phase, value in seconds.items()})
    recorder.end_trial("lora-2", "FINISHED")
    recorder.end_sweep("FINISHED")
    for mode in ("graph", "compiled"):
        assert recorded_timings(uri, device_of(tags), {"a-shape": replace(kind, mode=mode)})["a-shape"].mode == mode
    assert not (tmp_path / "nowhere").exists(), "reading creates no store"


@pytest.mark.parametrize(("own", "expected"), [(None, 30.0), (2.0, 6.0)])
def test_a_pack_is_charged_for_measuring_its_own_shapes(tmp_path: Path, own: float | None, expected: float) -> None:
    """The first pack of a queue spends the time of all; a store from before has only the time that was spent."""
    uri = default_tracking_uri(str(tmp_path), None)
    recorder = Recorder("before", uri)
    recorder.start_sweep("before-1", {}, {})
    tags = {SHAPE_TAG: "a-shape", MODE_TAG: "graph", DEVICE_TAG: "NVIDIA H200", "loragrid.threads": "8"}
    recorder.start_trial("lora-0", {"method.name": "lora", "training.steps": 10, "data.num_eval": 8}, tags)
    seconds = {"setup": 7.0, "measure": 30.0, "train": 20.0, "eval": 6.0} | ({"measure_shape": own} if own else {})
    recorder.log_summary("lora-0", {f"time/{phase}_seconds": value for phase, value in seconds.items()})
    recorder.end_trial("lora-0", "FINISHED")
    recorder.end_sweep("FINISHED")
    kind = PackKind(num_members=4, num_shapes=3, mode="graph")
    assert recorded_timings(uri, device_of(tags), {"a-shape": kind})["a-shape"].measure == expected


def test_packs_are_cut_for_the_gpus_of_the_machine(tiny_llama_dir: Path, chat_jsonl: Path) -> None:
    whole = plan_of(tiny_llama_dir, chat_jsonl, pack={"max_members": "auto"})
    here, placement = plan_on(whole, Node(num_cpus=16, num_gpus=4))
    assert placement.num_packs == 4
    assert here.packs == tuple(group_into_packs(whole.trials, PackConfig(), 4))


def test_a_pack_that_exceeds_the_gpu_is_named(the_plan: Plan) -> None:
    needed = the_plan.gpu_memory(the_plan.packs[0])
    assert needed is not None
    assert too_large(the_plan, 2**60) == []
    sentences = too_large(the_plan, 1)
    assert "pack-001 (4 trials) does not fit" in sentences[0]
    assert "halved" in sentences[0]
    assert "its trials will fail" in sentences[1], "full fine-tuning trains alone"


def test_every_shape_of_one_base_has_what_loading_it_took(
    tiny_llama_dir: Path, chat_jsonl: Path, the_plan: Plan
) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    rows = {(trial.model, trial.data): setup.rows for trial in the_plan.trials}
    timings = calibrate(the_plan.packs[:2], rows, torch.device("cpu"), engine=EngineConfig(), budget_seconds=60.0)
    (load,) = {timing.load for timing in timings.values()}
    assert load > 0.0


@pytest.mark.heavy
def test_a_later_plan_knows_the_time_that_calibrate_printed(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("training.steps", 3)

    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["loragrid", "plan", str(file), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    try:
        assert "time on this machine: not known" in run()
        assert "time on this machine: about" in run("--calibrate")
        assert "time on this machine: about" in run()
        estimate = json.loads(run("--json"))["time_on_this_machine"]
        assert estimate["total_seconds"] == pytest.approx(sum(estimate["pack_seconds"].values()))
        assert estimate["sources"] == ["calibrated"]
    finally:
        torch.set_num_threads(threads)
