"""A batch computed in parts trains as in one pass: 1 x 8 = 2 x 4 = 8 x 1."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from loragrid.cli.plan_table import render_plan
from loragrid.config.experiment import Experiment
from loragrid.data.labels import IGNORED
from loragrid.models.activation_checkpointing import checkpoint_activations
from loragrid.planning.plan import plan
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.step import Batch, PackModel, train_step
from loragrid_methods import method_names
from tests.support.small_packs import (
    Run,
    Setup,
    bit_equal,
    largest_difference,
    make_setup,
    mixed_trials,
    run_pack,
    worker_packs,
)

CPU = torch.device("cpu")
FIGURES = ("train/loss", "train/grad_norm", "eval/loss")


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


@pytest.fixture(scope="module")
def single_passes(setup: Setup) -> list[Run]:
    return [run_pack(setup, trials) for trials in worker_packs(setup)]


def test_the_packs_cover_every_method_and_setting(setup: Setup, single_passes: list[Run]) -> None:
    trials = [trial for trials in worker_packs(setup) for trial in trials]
    assert {trial.method.name for trial in trials} == set(method_names())
    for name in ("lora", "delta_lora"):
        assert len({t.method.hyperparameters()["rank"] for t in trials if t.method.name == name}) == 2
    assert any(trial.training.weight_decay for trial in trials if trial.method.name == "delta_lora")
    for run, pack in zip(single_passes, worker_packs(setup), strict=True):
        norms = [max(run.curve(member, "train/grad_norm").values()) for member in range(len(pack))]
        assert any(norm > (t.training.clip_norm or norm) for norm, t in zip(norms, pack, strict=True))
    targets = build_batches(trials[:1], setup.rows, CPU).training(0).label_targets
    assert len(set((targets != IGNORED).unflatten(0, (2, 4)).sum((1, 2)).tolist())) == 2


@pytest.mark.parametrize("micro_batch_size", [8, 4, 2, 1])
def test_eight_rows_train_alike_in_passes_of_any_size(
    setup: Setup, single_passes: list[Run], micro_batch_size: int
) -> None:
    for trials, single in zip(worker_packs(setup, micro_batch_size), single_passes, strict=True):
        run = run_pack(setup, trials)
        for member, trial in enumerate(trials):
            for key in FIGURES:
                difference = largest_difference(run.curve(member, key), single.curve(member, key))
                assert difference <= 1e-11, (trial.trial_id, key)
            assert largest_difference(run.weights(member), single.weights(member)) <= 1e-11, trial.trial_id


def test_a_single_micro_batch_changes_no_bit(setup: Setup) -> None:
    plain, whole = (mixed_trials(setup, batch_size=4, micro_batch_size=size) for size in (None, 4))
    first, second = run_pack(setup, plain), run_pack(setup, whole)
    assert first.records == second.records
    assert all(bit_equal(first.weights(member), second.weights(member)) for member in range(len(plain)))


def test_a_micro_batch_has_next_rows_and_step_labels() -> None:
    numbers = torch.arange(2 * 6).view(-1, 1)
    batch = Batch(
        input_ids=numbers,
        label_positions=numbers + 100,
        label_targets=numbers + 200,
        num_labels=torch.tensor([7.0, 9.0]),
    )
    parts = list(batch.micro_batches(2))
    assert [part.input_ids.flatten().tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    for part in parts:
        assert torch.equal(part.label_positions, part.input_ids + 100)
        assert torch.equal(part.label_targets, part.input_ids + 200)
        assert torch.equal(part.num_labels, batch.num_labels)
    assert list(batch.micro_batches(None)) == [batch]
    with pytest.raises(AssertionError, match="of equal size"):
        list(batch.micro_batches(4))


def test_a_step_sums_once_and_calls_hooks_once(setup: Setup) -> None:
    trials = mixed_trials(setup, batch_size=4, micro_batch_size=2, steps=3)
    sizes: list[int] = []
    calls: list[str] = []

    def watch(model: PackModel) -> None:
        model.base.base_model.register_forward_pre_hook(
            lambda module, arguments, keywords: sizes.append(len(keywords["input_ids"])), with_kwargs=True
        )
        stack = next(model.pack.stacks())
        stack.before_step = lambda: calls.append("before")  # type: ignore[method-assign]
        stack.after_step = lambda completed: calls.append("after")  # type: ignore[method-assign]

    run_pack(setup, trials, prepare=watch, eval_every=None, sum_over_workers=lambda tensor: calls.append("sum"))
    frozen, evaluation, passes = 5, 5, 3 * 2
    assert sizes == [2] * frozen + [2 * len(trials)] * (passes + evaluation)
    assert calls == ["sum", *["sum", "sum", "before", "after"] * 3, "sum"]


def test_micro_batches_draw_different_dropout_masks(tiny_gpt2_dir: Path, chat_jsonl: Path) -> None:
    # One row twice: nothing but the mask can make its two losses differ.
    setup = make_setup(tiny_gpt2_dir, chat_jsonl, "float64", num_train=1)
    trial = setup.trial("lora", {"dropout": 0.5}, batch_size=2, micro_batch_size=1)
    model = build_model([trial], setup.base())
    for stack in model.pack.stacks():
        stack.get_parameter("lora_B").data.fill_(0.05)
    batch = build_batches([trial], setup.rows, CPU).training(0)
    losses = []
    with torch.no_grad():
        for model.pack.clock.micro_batch, rows in enumerate(batch.micro_batches(1)):
            losses.append(model.losses(rows).item())
    assert abs(losses[0] - losses[1]) > 1e-4
    result = train_step(model, batch, lambda tensor: None)
    assert result.losses.tolist() == pytest.approx([sum(losses)], abs=1e-12)
    assert model.pack.clock.micro_batch == 0


def test_checkpointed_layers_repeat_the_masks_of_each_micro_batch(setup: Setup) -> None:
    trials = [t for t in mixed_trials(setup, batch_size=4, micro_batch_size=1) if "dropout" in t.method.field_names()]
    assert any(trial.method.hyperparameters()["dropout"] for trial in trials)
    base = setup.base()
    checkpoint_activations(base, True)
    plain, again = run_pack(setup, trials), run_pack(setup, trials, base=base)
    assert again.records == plain.records


@pytest.mark.parametrize("name", [name for name in method_names() if name != "frozen"])
def test_the_memory_estimate_falls_to_that_of_one_micro_batch(setup: Setup, name: str) -> None:
    def estimate(batch_size: int, micro_batch_size: int | None, num_workers: int = 1) -> tuple[int, int]:
        the_plan = plan(
            Experiment(
                name="x",
                model=setup.model,
                data=setup.data,
                training={"steps": 1000, "batch_size": batch_size, "micro_batch_size": micro_batch_size},
                methods=[name],
                workers={"num_workers": num_workers},
            )
        )
        found = the_plan.gpu_memory(the_plan.packs[0])
        assert found is not None
        return found.activations, found.total

    assert estimate(8, 2) == estimate(2, None) == estimate(16, 2, num_workers=4)
    (activations, total), (all_activations, all_in_all) = estimate(8, 2), estimate(8, None)
    assert activations < 0.3 * all_activations
    assert total < all_in_all


def test_the_plan_states_how_many_rows_are_held(setup: Setup) -> None:
    def shown(**training: int) -> str:
        asked = Experiment(
            name="x", model=setup.model, data=setup.data, training={"steps": 2, **training}, methods=["lora"]
        )
        console = Console(width=200)
        with console.capture() as capture:
            console.print(render_plan(plan(asked)))
        return capture.get()

    assert "2 steps of 8 rows, on each worker 4 at once\n" in shown(micro_batch_size=4)
    assert "at once" not in shown()
