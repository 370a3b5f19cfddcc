"""A queue's packs that do not fit into memory, predicted or not, are halved, and every trial gets its curve."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from loragrid.config.experiment import EngineConfig
from loragrid.training.loss import CHUNK_ROWS
from loragrid.training.step_mode import RequestedMode
from loragrid.trials.packing import Pack
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue import run_queue
from loragrid.worker.queue_worker import build_worker
from tests.support.queue_runs import STEPS, Seen, queue
from tests.support.small_packs import Setup, make_setup


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


@pytest.fixture(autouse=True)
def stores_that_pytest_cleans_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_pack_too_large_for_memory_is_halved_beforehand(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [
        setup.trial(name, {"rank": 4}, seed=seed, measure_steps=1) for name in ("lora", "vera") for seed in (0, 1)
    ]
    roomy = queue(setup, [trials])
    assert all("loragrid.pack.split" not in roomy.tags(trial) for trial in trials)
    parts = ("adapter", "gradient", "optimizer", "saved_activation", "loss")
    held = [sum(roomy.figures[trial.trial_id][f"memory/{part}_bytes"] for part in parts) for trial in trials]
    # What is left free is for blocks that an allocator cannot use.
    monkeypatch.setattr("loragrid.worker.room.free_memory", lambda device: 1.1 * sum(held) - 1)
    narrow = queue(setup, [trials])
    assert {end.status for end in narrow.ended.values()} == {"FINISHED"}
    for trial in trials:
        assert "out_of_memory: besides the base this pack needs" in narrow.tags(trial)["loragrid.pack.split"]
    monkeypatch.setattr("loragrid.worker.room.free_memory", lambda device: 1.1 * sum(held) + 1)
    assert all("loragrid.pack.split" not in queue(setup, [trials]).tags(trial) for trial in trials[:1])


def test_workers_that_take_over_know_what_the_trials_held_alone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [setup.trial("lora", seed=seed, measure_steps=1) for seed in range(4)]
    figures = queue(setup, [trials]).figures

    def restored(free: float) -> Seen:
        seen = Seen()
        group = ProcessGroup(device=torch.device("cpu"), isolate_failures=True)
        worker = build_worker(lambda model, data: setup.rows, seen, seen.store, group)
        for trial in trials:
            worker.reporter.figures(
                Pack(pack_id="pack-000", trials=(trial,)), {trial.trial_id: figures[trial.trial_id]}
            )
        monkeypatch.setattr("loragrid.worker.room.free_memory", lambda device: free)
        run_queue([Pack(pack_id="pack-000", trials=tuple(trials))], worker, None)
        assert seen.num_loaded() == 1
        return seen

    assert all("loragrid.pack.split" in restored(0.0).tags(trial) for trial in trials[:1])
    assert all("loragrid.pack.split" not in restored(float(2**40)).tags(trial) for trial in trials[:1])


def test_losses_count_as_one_chunk_in_the_forecast(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [setup.trial("lora", seed=seed, measure_steps=1, steps=2) for seed in range(32)]
    num_rows = trials[0].training.batch_size * setup.rows.train.label_positions.shape[1]
    assert len(trials) * num_rows > CHUNK_ROWS > num_rows
    alone = queue(setup, [trials[:1]]).figures[trials[0].trial_id]
    parts = ("adapter", "gradient", "optimizer", "saved_activation")
    beside = len(trials) * sum(alone[f"memory/{part}_bytes"] for part in parts)
    held = beside + CHUNK_ROWS / num_rows * alone["memory/loss_bytes"]
    monkeypatch.setattr("loragrid.worker.room.free_memory", lambda device: 1.1 * held + 1)
    seen = queue(setup, [trials])
    assert all("loragrid.pack.split" not in seen.tags(trial) for trial in trials)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its memory must run out for real")
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_pack_too_large_for_a_gpu_is_halved(tiny_llama_dir: Path, chat_jsonl: Path, mode: RequestedMode) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    trials = [setup.trial("lora", seed=seed, measure_steps=0, batch_size=64) for seed in range(48)]

    def on_gpu() -> Seen:
        seen = Seen()
        group = ProcessGroup(device=torch.device("cuda"), isolate_failures=True)
        worker = build_worker(lambda model, data: setup.rows, seen, seen.store, group, engine=EngineConfig(mode=mode))
        run_queue([Pack(pack_id="pack-000", trials=tuple(trials))], worker, None)
        assert {end.status for end in seen.ended.values()} == {"FINISHED"}, {e.reason for e in seen.ended.values()}
        return seen

    def held_already() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = held_already()
    whole = on_gpu()
    peak = whole.figures[trials[0].trial_id]["memory/pack_peak_bytes"] - before
    limit = held_already() + 0.75 * peak
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        halved = on_gpu()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out_of_memory" in halved.tags(trials[0])["loragrid.pack.split"]
    for trial in trials:
        ours, theirs = halved.records(trial), whole.records(trial)
        assert ours.keys() == theirs.keys()
        for step in range(1, STEPS + 1):
            assert ours[step]["train/loss"] == pytest.approx(theirs[step]["train/loss"], rel=1e-4)
