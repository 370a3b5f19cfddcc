"""A queue's packs in one worker share one base, stop trials that fall behind, and contain failures."""

import importlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import nn

import loragrid.evaluation.pack_scoring
import loragrid.planning.solo_run
from loragrid.config.experiment import EarlyStoppingConfig, EngineConfig
from loragrid.planning.timing import pack_shape
from loragrid.trials.packing import Pack, cut_evenly
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue import run_queue
from loragrid.worker.queue_worker import build_worker
from loragrid.worker.saved_trial import SavedTrial
from loragrid_methods.lora import LoRA
from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.targets import LayerShape
from tests.support.queue_runs import STEPS, Seen, assert_as_alone, queue
from tests.support.small_packs import Setup, make_setup, mixed_trials


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


@pytest.fixture(autouse=True)
def stores_that_pytest_cleans_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_packs_on_one_base_equal_solo_runs(setup: Setup) -> None:
    trials = mixed_trials(setup, measure_steps=1)
    seen = queue(setup, cut_evenly(trials, 5))
    assert {end.status for end in seen.ended.values()} == {"FINISHED"}
    assert set(seen.ended) == set(seen.figures) == {trial.trial_id for trial in trials}
    assert seen.num_loaded() == 1
    assert seen.exported == {trial.trial_id for trial in trials if trial.method.name != "frozen"}
    assert all(end.seconds["train"] > 0 for end in seen.ended.values())
    for trial in trials:
        assert_as_alone(setup, seen, trial)


def test_a_base_written_by_a_method_is_reloaded(setup: Setup) -> None:
    full, lora = setup.trial("full", lr=1e-3, measure_steps=1), setup.trial("lora", measure_steps=0)
    seen = queue(setup, [[full], [lora]])
    assert seen.num_loaded() == 3  # for the measurement, for the training, for LoRA
    assert_as_alone(setup, seen, full)
    assert_as_alone(setup, seen, lora)


class FaultyLoRA(LoRA):
    """LoRA that fails as a real method or a full device would: for one seed, or for too many members at once."""

    error: ClassVar[type[Exception]] = ZeroDivisionError
    bad_seed: ClassVar[int] = -1
    most_members: ClassVar[int] = 1000

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        if cls.bad_seed in seeds or len(seeds) > cls.most_members:
            raise cls.error("no such luck")
        return super().build_stacks(members, seeds, layers, base)


def faulty_trials(setup: Setup, number: int, measure_steps: int) -> list[Trial]:
    """LoRA trials of different seeds whose method may fail."""
    made = [setup.trial("lora", seed=seed, measure_steps=measure_steps) for seed in range(number)]
    method = FaultyLoRA(rank=3)
    return [Trial(**{**vars(trial), "method": method}) for trial in made]


@pytest.mark.parametrize("measure_steps", [0, 1])
def test_a_trial_whose_code_raises_fails_alone_with_its_traceback(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, measure_steps: int
) -> None:
    monkeypatch.setattr(FaultyLoRA, "bad_seed", 3)
    trials, other = faulty_trials(setup, 5, measure_steps), setup.trial("lora_fa", measure_steps=0)
    seen = queue(setup, [trials, [other]])
    ended = seen.ended
    bad = ended.pop(trials[3].trial_id)
    assert (bad.status, bad.reason) == ("FAILED", "no such luck")
    assert "build_stacks" in bad.traceback
    assert "ZeroDivisionError" in bad.traceback
    assert {end.status for end in ended.values()} == {"FINISHED"}
    monkeypatch.setattr(FaultyLoRA, "bad_seed", -1)
    for trial in [*trials[:3], trials[4], other]:
        assert_as_alone(setup, seen, trial)


def test_a_pack_is_halved_until_it_fits(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaultyLoRA, "most_members", 2)
    monkeypatch.setattr(FaultyLoRA, "error", torch.OutOfMemoryError)
    trials = faulty_trials(setup, 6, 0)
    seen = queue(setup, [trials])
    assert {end.status for end in seen.ended.values()} == {"FINISHED"}
    assert [seen.tags(trial)["loragrid.pack"] for trial in trials] == [
        "pack-000.0.0", "pack-000.0.0", "pack-000.0.1", "pack-000.1.0", "pack-000.1.0", "pack-000.1.1"
    ]  # fmt: skip
    reason = "pack-000.0 of 3 trials was halved: out_of_memory: no such luck"
    assert seen.tags(trials[0])["loragrid.pack.split"] == reason
    monkeypatch.undo()
    for trial in trials:
        assert_as_alone(setup, seen, trial)


def test_seconds_of_halved_packs_are_no_timing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, loragrid.evaluation.pack_scoring, "score_row_by_row")  # after its last step
    setup = replace(setup, rows=replace(setup.rows, test=setup.rows.evaluation))
    halved = [setup.trial("lora", seed=seed, measure_steps=0, report_every=1) for seed in range(2)]
    whole = [setup.trial("vera", seed=seed, measure_steps=0) for seed in range(2)]
    seen = queue(setup, [halved, whole], describe=lambda trial, rows, just_loaded: {})
    assert [seen.tags(trial)["loragrid.pack.shape"] for trial in halved] == ["halved"] * 2
    assert {seen.tags(trial)["loragrid.pack.shape"] for trial in whole} == {pack_shape(whole, EngineConfig())}


@pytest.mark.parametrize("measure_steps", [0, 1])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError, MemoryError, type("E", (RuntimeError,), {})], ids=["device", "python", "cpu"]
)
def test_a_trial_that_does_not_fit_alone_is_a_result(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, measure_steps: int, error: type[Exception]
) -> None:
    text = "no such luck"
    if error.__name__ == "E":
        text = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
    monkeypatch.setattr(FaultyLoRA, "most_members", 0)
    monkeypatch.setattr(FaultyLoRA, "error", lambda _: error(text))
    (trial,), other = faulty_trials(setup, 1, measure_steps), setup.trial("vera", measure_steps=0)
    seen = queue(setup, [[trial], [other]])
    assert seen.ended[trial.trial_id].reason == f"out_of_memory: {text}"
    assert seen.tags(trial)["loragrid.out_of_memory"] == "true"
    assert seen.ended[other.trial_id].status == "FINISHED"


def test_a_failed_pack_restarts_and_repeats_no_report(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [setup.trial("lora", lr=rate, measure_steps=0, report_every=1) for rate in (0.01, 0.02, 0.03, 0.04)]
    calls: list[None] = []
    original = torch.nn.functional.scaled_dot_product_attention
    # Its forwards would be counted, too.
    monkeypatch.setattr("loragrid.worker.resident_base.check_base", lambda *_, **__: None)

    def fails_once(*arguments: Any, **settings: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) in (11, 22):  # in the third step, and in the third of the first half's second attempt
            raise torch.OutOfMemoryError("for the moment")
        result: torch.Tensor = original(*arguments, **settings)
        return result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fails_once)
    seen = queue(setup, [trials], EarlyStoppingConfig(grace_steps=4, reduction_factor=2))
    assert len(calls) > 22
    assert sorted(end.status for end in seen.ended.values()) == ["FINISHED"] * 2 + ["KILLED"] * 2
    for trial in trials:
        finished = seen.ended[trial.trial_id].status == "FINISHED"
        assert_as_alone(setup, seen, trial, STEPS if finished else 4)


@pytest.mark.parametrize("check_every", [0, None])
def test_a_failed_measurement_ends_only_its_trial(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, check_every: int | None
) -> None:
    fail_once(monkeypatch, loragrid.planning.solo_run, "train_step")
    bad, other = (setup.trial(name, measure_steps=1, check_every=check_every) for name in ("lora", "vera"))
    seen = queue(setup, [[bad, other]])
    assert seen.ended[bad.trial_id].reason == "out_of_memory: for the moment"
    assert seen.ended[other.trial_id].status == "FINISHED"
    assert_as_alone(setup, seen, other)


@pytest.mark.parametrize(
    "place", ["loragrid.training.assembly.MemberAdamW", "loragrid.worker.pack_trainer.InvariantChecks"]
)
def test_a_failure_while_attaching_leaves_nothing_attached(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    module, _, name = place.rpartition(".")
    fail_once(monkeypatch, importlib.import_module(module), name)
    trials = [setup.trial("lora", seed=seed, measure_steps=0) for seed in range(2)]
    seen = queue(setup, [trials])
    assert {end.status for end in seen.ended.values()} == {"FINISHED"}
    for trial in trials:
        assert_as_alone(setup, seen, trial)


def test_an_ended_trial_is_not_trained_in_a_half(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [setup.trial("lora", seed=seed, measure_steps=0, checkpoint_every=1) for seed in range(3)]
    original = TrialStore.save

    def cannot_save_the_first(store: TrialStore, trial_id: str, saved: SavedTrial) -> None:
        if trial_id == trials[0].trial_id:
            raise OSError("disk full")
        if saved.state.completed == 3 and trial_id == trials[2].trial_id and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("for the moment")
        original(store, trial_id, saved)

    failed: list[bool] = []
    monkeypatch.setattr(TrialStore, "save", cannot_save_the_first)
    seen = queue(setup, [trials])
    assert seen.ended[trials[0].trial_id].reason == "disk full"
    assert [seen.ended[trial.trial_id].status for trial in trials[1:]] == ["FINISHED"] * 2
    halves = [update.trial_ids for update in seen.updates if update.phase == "waiting"]
    assert halves == [(trials[1].trial_id,), (trials[2].trial_id,)]


def fail_once(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    """Let the module's `name` raise at its first call, as a full device does."""
    original = getattr(module, name)
    calls: list[None] = []

    def fails_once(*arguments: Any, **settings: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("for the moment")
        return original(*arguments, **settings)

    monkeypatch.setattr(module, name, fails_once)


def test_an_unloadable_base_fails_exactly_its_trials(setup: Setup) -> None:
    missing = setup.model.model_copy(update={"name": "/nowhere/at/all"})
    lost = [Trial(**{**vars(setup.trial("lora", seed=seed)), "model": missing}) for seed in range(3)]
    seen, other = Seen(), setup.trial("vera", measure_steps=0)
    group = ProcessGroup(device=torch.device("cpu"), isolate_failures=True)
    worker = build_worker(lambda model, data: setup.rows, seen, seen.store, group)
    run_queue([Pack(pack_id="a", trials=tuple(lost)), Pack(pack_id="b", trials=(other,))], worker, None)
    reasons = {seen.ended[trial.trial_id].reason for trial in lost}
    assert len(reasons) == 1
    assert "/nowhere/at/all" in reasons.pop()
    assert seen.num_loaded() == 2
    assert seen.ended[other.trial_id].status == "FINISHED"


def test_with_other_workers_waiting_a_failure_ends_the_queue(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaultyLoRA, "bad_seed", 0)
    with pytest.raises(ZeroDivisionError, match="no such luck"):
        queue(setup, [faulty_trials(setup, 2, 0)], isolate_failures=False)


def test_seconds_by_phase_add_up_until_the_end(tiny_gpt2_dir: Path, chat_jsonl: Path) -> None:
    setup = make_setup(tiny_gpt2_dir, chat_jsonl, "float64", num_test=5)
    trials = [setup.trial("lora", measure_steps=1, eval_every=2, checkpoint_every=3, lr=lr) for lr in (0.01, 0.02)]
    start, told = time.monotonic(), dict[str, float]()

    class Timed(Seen):
        def __call__(self, update: PackUpdate) -> None:
            super().__call__(update)
            told.update(dict.fromkeys(update.ended, time.monotonic()))

    seen = Timed()
    group = ProcessGroup(device=torch.device("cpu"), isolate_failures=True)
    worker = build_worker(lambda model, data: setup.rows, seen, seen.store, group)
    run_queue([Pack(pack_id="pack-000", trials=tuple(trials))], worker, None)
    phases = {"setup", "measure", "data", "train", "check", "eval", "checkpoint", "report"}
    for trial in trials:
        seconds = seen.ended[trial.trial_id].seconds
        assert seconds.keys() == phases
        # What lies between is the way from one call of the trainer to the next.
        assert 0.97 * (told[trial.trial_id] - start) < sum(seconds.values()) <= told[trial.trial_id] - start
