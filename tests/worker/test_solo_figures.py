"""The shapes of a queue are measured once each, in packs of one, and take their timed steps in turns."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loragrid.planning.solo_run import SoloRun, take_turns
from tests.support.queue_runs import assert_as_alone, queue
from tests.support.small_packs import Setup, make_setup


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


@pytest.fixture(autouse=True)
def stores_that_pytest_cleans_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_trials_of_one_shape_in_several_packs_are_measured_once(setup: Setup) -> None:
    trials = [setup.trial("lora", seed=seed, measure_steps=1) for seed in range(3)]
    seen = queue(setup, [[trial] for trial in trials])
    assert sum(update.phase.startswith("measuring") for update in seen.updates) == 1
    assert len({tuple(figures.values()) for figures in seen.figures.values()}) == 1


def test_shapes_of_a_whole_queue_are_timed_in_turns(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that lasts for a while then slows every shape, and not only the one that is measured at that moment."""
    names = ("lora", "vera", "lora_plus", "dora", "full")
    trials = [setup.trial(name, measure_steps=3, lr=1e-3) for name in names]
    order: list[str] = []
    original = SoloRun.take_step

    def take_step(run: SoloRun) -> None:
        order.append(run.trial.method.name)
        original(run)

    monkeypatch.setattr(SoloRun, "take_step", take_step)
    seen = queue(setup, [[trial] for trial in trials])
    # LoRA+ has LoRA's shape. Full fine-tuning writes the base, and takes its steps alone.
    assert order == ["lora", "vera", "dora"] * 3 + ["full"] * 3
    assert {end.status for end in seen.ended.values()} == {"FINISHED"}
    figures = [seen.figures[trial.trial_id] for trial in trials]
    assert figures[0] == figures[2]
    assert len({own["time/step_seconds"] for own in figures}) == 4
    for own in figures:
        assert own["time/measure_repeats"] == 3
        assert 0 < own["time/step_low_seconds"] <= own["time/step_seconds"] <= own["time/step_high_seconds"]
    for trial in trials:
        assert_as_alone(setup, seen, trial)


@pytest.mark.parametrize("free", [0.0, float(2**40)], ids=["one at a time", "all together"])
def test_without_room_for_several_shapes_each_is_timed_alone(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, free: float
) -> None:
    monkeypatch.setattr("loragrid.worker.room.free_memory", lambda device: free)
    together: list[int] = []

    def counted(runs: Sequence[SoloRun], *arguments: Any) -> dict[str, float]:
        together.append(len(runs))
        return take_turns(runs, *arguments)

    monkeypatch.setattr("loragrid.worker.solo_figures.take_turns", counted)
    trials = [setup.trial(name, measure_steps=2) for name in ("lora", "vera", "dora")]
    seen = queue(setup, [[trial] for trial in trials])
    assert together == ([3] if free else [1, 1, 1])
    assert {end.status for end in seen.ended.values()} == {"FINISHED"}


def test_a_timed_step_that_fails_ends_only_its_trials(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [setup.trial(name, measure_steps=2) for name in ("lora", "vera", "dora")]
    original = SoloRun.take_step

    def take_step(run: SoloRun) -> None:
        if run.trial.method.name == "vera":
            raise torch.OutOfMemoryError("for the moment")
        original(run)

    monkeypatch.setattr(SoloRun, "take_step", take_step)
    seen = queue(setup, [trials])
    assert seen.ended[trials[1].trial_id].reason == "out_of_memory: for the moment"
    assert [seen.ended[trials[index].trial_id].status for index in (0, 2)] == ["FINISHED"] * 2
    # In a pack of its own, a trial is measured again.
    seen = queue(setup, [[trial] for trial in trials])
    assert seen.ended[trials[1].trial_id].reason == "out_of_memory: for the moment"
    assert sum(update.phase.startswith("measuring vera") for update in seen.updates) == 2
