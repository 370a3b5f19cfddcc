"""One training loop for every pack: what a member learns depends only on its own trial."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from loragrid.training.assembly import build_batches, build_model
from loragrid.training.evaluate import evaluate
from loragrid.training.meters import Stopwatch
from loragrid.training.schedule import factor
from loragrid.training.step import PackModel, one_worker
from loragrid.trials.trial import Trial
from loragrid_methods import get_method, method_names
from tests.support.small_packs import (
    NUM_EVAL,
    Run,
    Setup,
    bit_equal,
    largest_difference,
    make_setup,
    mixed_trials,
    run_pack,
)

STEPS = 8
LOSSES = ("train/loss", "eval/loss")
FIGURES = (*LOSSES, "train/grad_norm", "train/learning_rate")


@pytest.fixture(scope="module")
def exact(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


@pytest.fixture(scope="module")
def single(tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_llama_dir, chat_jsonl, "float32")


@pytest.fixture(scope="module")
def mixed_run(exact: Setup) -> Run:
    return run_pack(exact, mixed_trials(exact))


def test_a_mixed_pack_has_every_packable_method_and_different_curves(exact: Setup, mixed_run: Run) -> None:
    trials = mixed_trials(exact)
    names = {trial.method.name for trial in trials}
    assert names == {name for name in method_names() if get_method(name).packable}
    for key in ("lr", "schedule", "warmup_steps", "weight_decay", "clip_norm"):
        assert len({getattr(trial.training, key) for trial in trials}) >= 3
    trained = [
        tuple(mixed_run.curve(member, "eval/loss").values())
        for member, trial in enumerate(trials)
        if trial.method.name != "frozen"
    ]
    assert len(set(trained)) == len(trained)
    norms = [mixed_run.curve(member, "train/grad_norm") for member in range(len(trials))]
    assert any(
        trial.training.clip_norm is not None and max(norm.values()) > trial.training.clip_norm
        for trial, norm in zip(trials, norms, strict=True)
    )


def test_members_of_mixed_packs_equal_solo_runs_in_float64(exact: Setup, mixed_run: Run) -> None:
    for member, trial in enumerate(mixed_trials(exact)):
        alone = run_pack(exact, [trial])
        assert set(alone.records[0]) == set(range(STEPS + 1))
        assert set(alone.curve(0, "eval/loss")) == {0, 3, 6, 8}
        for key in FIGURES:
            assert largest_difference(mixed_run.curve(member, key), alone.curve(0, key)) <= 1e-10, trial.trial_id
        assert largest_difference(mixed_run.weights(member), alone.weights(0)) <= 1e-10, trial.trial_id


@pytest.mark.parametrize("name", [name for name in method_names() if name != "frozen"])
def test_the_loop_equals_torchs_adamw_and_clipping_with_hooks(exact: Setup, name: str) -> None:
    trial = exact.trial(name, seed=1, weight_decay=0.1, clip_norm=0.2, warmup_steps=2, batch_size=2)
    run = run_pack(exact, [trial])

    model = build_model([trial], exact.base())
    batches = build_batches([trial], exact.rows, torch.device("cpu"))
    named = [pair for stack in model.pack.stacks() for pair in stack.named_parameters()]
    # Full fine-tuning does not decay norms and biases, as the test of `full` compares with transformers' Trainer.
    decays = [0.1 if trial.method.is_decayed(parameter_name) else 0.0 for parameter_name, _ in named]
    groups = [{"params": [parameter], "weight_decay": own} for (_, parameter), own in zip(named, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    for step in range(STEPS):
        batch = batches.training(step)
        logits = model.base(input_ids=batch.input_ids).logits
        predicted = logits.gather(1, batch.label_positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        loss = F.cross_entropy(predicted.flatten(0, 1), batch.label_targets.flatten())
        assert run.curve(0, "train/loss")[step + 1] == pytest.approx(loss.item(), abs=1e-10)
        model.optimizer.zero_gradients()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], 0.2)
        assert run.curve(0, "train/grad_norm")[step + 1] == pytest.approx(norm.item(), abs=1e-10)
        model.pack.before_step()
        for (parameter_name, _), group in zip(named, optimizer.param_groups, strict=True):
            multiplier = trial.method.learning_rate_multiplier(parameter_name)
            group["lr"] = trial.training.lr * factor(trial.training, step) * multiplier
        optimizer.step()
        model.pack.after_step(step + 1)
    hand_written = Run(model=model).weights(0)
    assert largest_difference(run.weights(0), hand_written) <= 1e-10


def test_an_evaluation_that_fails_leaves_the_members_in_training(exact: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [exact.trial("lora", {"dropout": 0.5})]
    model, batches = build_model(trials, exact.base()), build_batches(trials, exact.rows, torch.device("cpu"))

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("for the moment")

    monkeypatch.setattr(model, "losses", fails)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, batches, one_worker)
    assert all(stack.training for stack in model.pack.stacks())


def test_members_of_mixed_packs_equal_solo_runs_in_float32(single: Setup) -> None:
    trials = mixed_trials(single)
    packed = run_pack(single, trials)
    for member, trial in enumerate(trials):
        alone = run_pack(single, [trial])
        for key in LOSSES:
            difference = largest_difference(packed.curve(member, key), alone.curve(0, key), relative=True)
            assert difference <= 1e-5, trial.trial_id


def test_before_training_every_method_evaluates_to_the_bare_bases_loss(exact: Setup, mixed_run: Run) -> None:
    base, rows = exact.base(), exact.rows.evaluation
    with torch.no_grad():
        logits = base(input_ids=rows.input_ids).logits
    predicted = logits.gather(1, rows.label_positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    expected = F.cross_entropy(predicted.flatten(0, 1), rows.label_targets.flatten()).item()

    trials = mixed_trials(exact)
    model, batches = build_model(trials, base), build_batches(trials, exact.rows, torch.device("cpu"))
    own = evaluate(model, batches, one_worker)
    frozen = evaluate(model, batches, one_worker, frozen=True)
    assert own.shape == (len(trials),)
    assert frozen.shape == (1,)
    assert largest_difference({"own": own, "frozen": frozen}, {"own": expected, "frozen": expected}) <= 1e-12
    for member in range(len(trials)):
        assert mixed_run.curve(member, "eval/loss")[0] == pytest.approx(expected, abs=1e-12)


def test_only_the_frozen_members_loss_does_not_fall(exact: Setup, mixed_run: Run) -> None:
    for member, trial in enumerate(mixed_trials(exact)):
        losses = list(mixed_run.curve(member, "eval/loss").values())
        if trial.method.name == "frozen":
            assert max(losses) - min(losses) <= 1e-12
            assert set(mixed_run.curve(member, "train/grad_norm").values()) == {0.0}
        else:
            assert losses[-1] < losses[0]


def test_full_fine_tuning_has_the_lowest_loss(exact: Setup) -> None:
    full = run_pack(exact, [exact.trial("full", lr=0.003)])
    losses = full.curve(0, "eval/loss")
    assert list(losses) == [0, 3, 6, 8]
    assert losses[8] < losses[6] < losses[3] < losses[0] - 0.1
    lora = run_pack(exact, [exact.trial("lora", lr=0.003)])
    assert losses[8] < lora.curve(0, "eval/loss")[8]


@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("how", ["a learning rate of 1e30", "a poisoned weight"])
def test_a_diverging_member_leaves_the_others_bit_equal(single: Setup, victim: int, how: str) -> None:
    def trials(lr: float) -> list[Trial]:
        return [
            single.trial(name, seed=member, clip_norm=None if member == 1 else 1.0, lr=lr if member == victim else 0.01)
            for member, name in enumerate(["lora", "lora", "lora", "vera"])
        ]

    def poison(model: PackModel) -> None:
        if how == "a poisoned weight":
            stacks, member = model.pack.member_stacks(victim)
            next(iter(stacks.values())).get_parameter("lora_B").data[member, 0, 0] = float("nan")

    healthy = run_pack(single, trials(0.01), eval_every=1)
    sick = run_pack(
        single, trials(1e30 if how == "a learning rate of 1e30" else 0.01), prepare=poison, eval_every=1, report_every=2
    )
    # The huge step itself is finite: the loss of the next one is not.
    diverged_at = 2 if how == "a learning rate of 1e30" else 1
    assert sick.reports[-1].diverged_at == [diverged_at if member == victim else None for member in range(4)]
    assert set(sick.curve(victim, "train/loss")) == set(range(1, diverged_at))
    assert set(sick.curve(victim, "eval/loss")) == {0}
    assert healthy.reports[-1].diverged_at == [None] * 4
    for member in set(range(4)) - {victim}:
        assert bit_equal(sick.weights(member), healthy.weights(member))
        assert sick.records[member] == healthy.records[member]


def test_a_member_that_diverged_keeps_its_last_weights(single: Setup) -> None:
    run = run_pack(single, [single.trial("lora", lr=1e30), single.trial("lora", seed=1)])
    short = run_pack(single, [single.trial("lora", lr=1e30, steps=1), single.trial("lora", seed=1, steps=1)])
    # The schedule knows the number of steps, but the first step's rate is the whole rate either way.
    assert bit_equal(run.weights(0), short.weights(0))
    assert all(torch.isfinite(tensor).all() for tensor in run.weights(0).values())


@pytest.mark.parametrize(("dropout", "num_losses"), [(0.5, STEPS), (0.0, 1)])
def test_the_loop_draws_another_dropout_mask_at_every_step(
    tiny_gpt2_dir: Path, chat_jsonl: Path, dropout: float, num_losses: int
) -> None:
    # One row, and steps too small to change a weight: nothing but the mask can change the loss.
    setup = make_setup(tiny_gpt2_dir, chat_jsonl, "float64", num_train=1)
    trial = setup.trial("lora", {"dropout": dropout}, lr=1e-40, batch_size=1)
    run = run_pack(setup, [trial], prepare=fill_lora_B)
    assert len({round(loss, 12) for loss in run.curve(0, "train/loss").values()}) == num_losses
    assert len({round(loss, 12) for step, loss in run.curve(0, "eval/loss").items() if step}) == 1


def test_dropout_differs_by_seed_step_worker_not_in_evaluation(exact: Setup) -> None:
    trials = [exact.trial("lora", {"dropout": 0.5}, seed=seed) for seed in (0, 1)]
    model = build_model(trials, exact.base())
    fill_lora_B(model)
    batch = build_batches([trials[0]] * 2, exact.rows, torch.device("cpu")).training(0)
    for parameter in model.pack.trainable_parameters():
        parameter.data[1] = parameter.data[0]  # now the members differ in nothing but their seed

    def losses(step: int, worker: int = 0) -> list[float]:
        model.pack.clock.step, model.pack.clock.worker = step, worker
        return [round(loss, 12) for loss in model.losses(batch).tolist()]

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1), *losses(0, worker=1)}) == 6
    model.pack.train(False)
    assert len({*losses(0), *losses(1), *losses(0, worker=1)}) == 1


@torch.no_grad()
def fill_lora_B(model: PackModel) -> None:
    """Give every update an effect: B starts at zero."""
    for stack in model.pack.stacks():
        stack.get_parameter("lora_B").fill_(0.05)


def test_the_loop_reports_evaluates_and_saves_on_schedule(exact: Setup) -> None:
    trials = [exact.trial("lora", steps=9), exact.trial("vera", steps=9)]
    run = run_pack(exact, trials, report_every=4, eval_every=None, checkpoint_every=3)
    told = [(report.completed, report.checkpoint_due, report.finished) for report in run.reports]
    assert [at for at, _, _ in told] == [0, 3, 4, 6, 8, 9]
    assert [at for at, checkpoint_due, _ in told if checkpoint_due] == [3, 6, 9]
    assert [at for at, _, finished in told if finished] == [9]
    assert set(run.curve(0, "eval/loss")) == {0, 9}
    assert set(run.curve(1, "train/loss")) == set(range(1, 10))
    assert [len(report.records[0]) for report in run.reports] == [1, 3, 1, 2, 2, 1]


def test_every_second_belongs_to_one_phase(exact: Setup) -> None:
    ticks = itertools.count()
    stopwatch = Stopwatch(lambda: float(next(ticks)))
    run_pack(exact, [exact.trial("lora", steps=4)], eval_every=2, stopwatch=stopwatch)
    # Each phase asks the clock at its start and at its end, so it takes one tick. A step's rows are put together, and
    # copied when the step before is done; an evaluation, and a report, wait for the steps before.
    assert stopwatch.seconds() == {"eval": 1 + 2, "data": 4 + 4, "train": 4 + 4 + 2 + 3}


def test_evaluation_counts_every_row_once_and_no_padding_row(exact: Setup) -> None:
    batches = build_batches([exact.trial("lora", batch_size=4)], exact.rows, torch.device("cpu"))
    assert NUM_EVAL % 4
    assert {batch.input_ids.shape for batch in batches.evaluation(1)} == {(4, exact.rows.train.input_ids.shape[1])}
    counted = sum(int((batch.label_targets >= 0).sum()) for batch in batches.evaluation(1))
    assert counted == exact.rows.evaluation.num_labels == batches.num_eval_labels
