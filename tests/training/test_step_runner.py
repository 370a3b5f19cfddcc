"""A step runner goes from eager to replayed steps; a stub replaces the capture, so no GPU is needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loragrid.training.step_runner
from loragrid.training.cuda_graphs import STEPS_BEFORE_CAPTURE, CapturedEvaluation
from loragrid.training.step import Batch, PackModel, StepResult, SumOverWorkers, compute_step
from loragrid.training.step_mode import ModeChoice
from loragrid.training.step_runner import StepRunner
from tests.support.small_packs import Setup, make_setup, mixed_trials, run_pack


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


class StubStep:
    """Computes a step where a capture would replay it, and counts."""

    error: type[Exception] | None = None
    num_made = num_replayed = 0
    gradients: Any = None

    def __init__(self, model: PackModel, batch: Batch, rates: Tensor) -> None:
        type(self).num_made += 1
        if self.error is not None:
            raise self.error("no such luck\nand more of it")
        self.model = model

    def replay(self, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
        type(self).num_replayed += 1
        return compute_step(self.model, batch, rates, sum_over_workers)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[StubStep]:
    made: type[StubStep] = type("Stub", (StubStep,), {})
    monkeypatch.setattr(loragrid.training.step_runner, "CapturedStep", made)
    monkeypatch.setattr(loragrid.training.step_runner, "_compute_on_capture_stream", compute_step)
    monkeypatch.setattr(loragrid.training.step_runner, "recover_from_failed_capture", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def test_a_step_is_captured_once_and_then_replayed(setup: Setup, stub: type[StubStep]) -> None:
    trials, runner = mixed_trials(setup), StepRunner(ModeChoice(mode="graph", reason="test"))
    run = run_pack(setup, trials, compute=runner, eval_every=None)
    steps = trials[0].training.num_steps
    assert (stub.num_made, stub.num_replayed) == (1, steps - STEPS_BEFORE_CAPTURE)
    assert runner.mode == "graph"
    assert isinstance(run.model.evaluate_batch, CapturedEvaluation)
    assert run.records == run_pack(setup, trials, eval_every=None).records


def test_after_a_failed_capture_steps_run_eagerly(setup: Setup, stub: type[StubStep]) -> None:
    stub.error = RuntimeError
    trials, runner = mixed_trials(setup), StepRunner(ModeChoice(mode="graph", reason="test"))
    run = run_pack(setup, trials, compute=runner)
    assert (stub.num_made, stub.num_replayed) == (1, 0)
    reason = "the step could not be captured: no such luck"
    assert runner.tags() == {"loragrid.engine": "eager", "loragrid.engine.reason": reason}
    assert run.records == run_pack(setup, trials).records


def test_a_capture_without_memory_fails_the_pack(setup: Setup, stub: type[StubStep]) -> None:
    stub.error = torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError):
        run_pack(setup, mixed_trials(setup), compute=StepRunner(ModeChoice(mode="graph", reason="test")))


def test_why_a_base_keeps_its_own_attention_is_a_tag() -> None:
    runner = StepRunner(ModeChoice(mode="eager", reason="engine.mode", attention="it has attention sinks"))
    assert runner.tags()["loragrid.engine.attention"] == "it has attention sinks"
    assert "loragrid.engine.attention" not in StepRunner(ModeChoice(mode="eager", reason="no GPU")).tags()
