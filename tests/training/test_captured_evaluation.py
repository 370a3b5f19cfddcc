"""Captured evaluation between captured steps returns what eager evaluation returns, and does not affect training."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loragrid.training.cuda_graphs
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.cuda_graphs import BATCHES_BEFORE_CAPTURE, CapturedEvaluation
from loragrid.training.evaluate import score_row_by_row, summed_losses
from loragrid.training.meters import Stopwatch
from loragrid.training.step import Batch, PackModel, evaluate_batch, one_worker
from loragrid.training.step_mode import ModeChoice
from loragrid.training.step_runner import StepRunner
from tests.support.small_packs import Run, Setup, base_on, bit_equal, make_setup, mixed_trials, run_pack

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only one can capture an evaluation")
STEPS = 12


@pytest.fixture(scope="module")
def setup(tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_llama_dir, chat_jsonl, "float32")


def captured_run(setup: Setup, eval_every: int | None) -> tuple[Run, StepRunner]:
    trials = [trial for trial in mixed_trials(setup, steps=STEPS) if not trial.method.capture_obstacle()]
    engine = StepRunner(ModeChoice(mode="graph", reason="test"))
    base = base_on(setup, torch.device("cuda"))
    run = run_pack(setup, trials, base=base, compute=engine, eval_every=eval_every)
    assert engine.choice.mode == "graph", engine.choice.reason
    return run, engine


@needs_gpu
def test_captured_evaluations_equal_eager_ones_and_leave_training_unchanged(setup: Setup) -> None:
    run, engine = captured_run(setup, 1)
    undisturbed, _ = captured_run(setup, None)
    for member in range(run.model.pack.num_members):
        assert bit_equal(run.weights(member), undisturbed.weights(member)), member
        ours, theirs = run.curve(member, "train/loss"), undisturbed.curve(member, "train/loss")
        assert ours == theirs, member
    assert isinstance(run.model.evaluate_batch, CapturedEvaluation)
    trials = [trial for trial in mixed_trials(setup, steps=STEPS) if not trial.method.capture_obstacle()]
    batches = build_batches(trials, setup.rows, torch.device("cuda"))

    def scores() -> list[Tensor]:
        alone = score_row_by_row(run.model, batches, setup.rows.evaluation, one_worker)
        return [summed_losses(run.model, batches), alone, summed_losses(run.model, batches, num_batches=1)]

    for _ in range(3):  # rows by themselves are batches of another shape, captured only now
        captured = scores()
    assert engine.tags().keys() == {"loragrid.engine", "loragrid.engine.reason"}
    assert len(run.model.evaluate_batch._captured) == 2
    run.model.evaluate_batch = evaluate_batch
    assert all(torch.equal(a, b) for a, b in zip(captured, scores(), strict=True))


@needs_gpu
def test_an_evaluation_that_cannot_be_captured_runs_eagerly(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = captured_run(setup, 1)
    losses = PackModel.losses

    def look(self: PackModel, batch: Batch) -> Tensor:
        found = losses(self, batch)
        if not torch.is_grad_enabled():
            found.sum().item()
        return found

    monkeypatch.setattr(PackModel, "losses", look)
    run, engine = captured_run(setup, 1)
    assert engine.tags()["loragrid.engine.evaluation"].startswith("eager: ")
    assert torch.rand(1, device="cuda").isfinite(), "the device's own generator must not be left in a capture"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert run.records == expected.records


class StubCapture:
    """Stands for a captured batch where nothing can be captured; 1000 more than what the batch gives."""

    made: list[int]
    """How many rows each has that was made."""

    def __init__(self, model: PackModel, batch: Batch, step: object) -> None:
        self.model, self.shape = model, batch.input_ids.shape
        self.made.append(len(batch.input_ids))
        assert (step is None) == (len(self.made) == 1), "the rehearsal alone has memory of its own"

    def replay(self, batch: Batch) -> Tensor:
        assert batch.input_ids.shape == self.shape, "a capture holds for one shape"
        return self.model.losses(batch) + 1000.0


class FailingCapture(StubCapture):
    """Every capture fails."""

    def __init__(self, model: PackModel, batch: Batch, step: object) -> None:
        super().__init__(model, batch, step)
        raise RuntimeError("no such luck\nand more of it")


class NarrowCapture(StubCapture):
    """Of long batches the capture runs out of memory."""

    def __init__(self, model: PackModel, batch: Batch, step: object) -> None:
        super().__init__(model, batch, step)
        if len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError("no room")


@pytest.fixture(params=[StubCapture, FailingCapture, NarrowCapture])
def capture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[StubCapture]:
    stub: type[StubCapture] = request.param
    stub.made = []
    monkeypatch.setattr(loragrid.training.cuda_graphs, "_CapturedBatch", stub)
    monkeypatch.setattr(loragrid.training.cuda_graphs, "recover_from_failed_capture", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return stub


def test_each_batch_shape_is_captured_or_stays_eager(setup: Setup, capture: type[StubCapture]) -> None:
    trials = [setup.trial("lora", batch_size=4)]
    model, batches = (
        build_model(trials, copy.deepcopy(setup.base())),
        build_batches(trials, setup.rows, torch.device("cpu")),
    )
    evaluation = CapturedEvaluation(object(), Stopwatch())  # type: ignore[arg-type]  # no graph without a GPU
    long = batches.evaluation(1)[0]
    short = replace(
        long, **{name: getattr(long, name)[:2] for name in ("input_ids", "label_positions", "label_targets")}
    )
    with torch.no_grad():
        is_captured = {
            name: [evaluation(model, batch).item() > 500.0 for _ in range(BATCHES_BEFORE_CAPTURE + 2)]
            for name, batch in (("long", long), ("short", short))
        }
    after_some, never = [False] * BATCHES_BEFORE_CAPTURE + [True] * 2, [False] * (BATCHES_BEFORE_CAPTURE + 2)
    expected = {
        StubCapture: (after_some, after_some, [1, 4, 2], ""),
        FailingCapture: (never, never, [1], "no such luck"),
        NarrowCapture: (never, after_some, [1, 4, 2], "no room"),
    }[capture]
    assert (is_captured["long"], is_captured["short"], capture.made, evaluation.obstacle) == expected


def test_the_bare_base_is_never_evaluated_by_a_members_capture(setup: Setup) -> None:
    trials = [setup.trial("lora", batch_size=4)]
    model, batches = build_model(trials, setup.base()), build_batches(trials, setup.rows, torch.device("cpu"))
    expected = summed_losses(model, batches, frozen=True)
    alone = score_row_by_row(model, batches, setup.rows.evaluation, one_worker, frozen=True)
    model.evaluate_batch = lambda model, batch: torch.full_like(batch.num_labels, 1000.0)
    assert torch.equal(summed_losses(model, batches, frozen=True), expected)
    assert torch.equal(score_row_by_row(model, batches, setup.rows.evaluation, one_worker, frozen=True), alone)
    assert summed_losses(model, batches).item() == 1000.0 * len(batches.evaluation(1))
