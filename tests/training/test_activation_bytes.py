"""Every step keeps as many bytes for the backward pass as the first; if the graph grows, the trials fail."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loragrid.models.activation_checkpointing import checkpoint_activations
from loragrid.training.activation_bytes import ActivationBytes
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.meters import count_activation_bytes
from loragrid.training.step import Batch, PackModel, compute_step, one_worker, train_step
from loragrid_methods import method_names
from tests.support.broken_invariants import FLIPPED_AFTER, first_stack, queue_with
from tests.support.queue_runs import assert_as_alone
from tests.support.small_packs import Setup, bit_equal, make_setup, mixed_trials, run_pack

STEPS = 8


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_llama_dir, chat_jsonl, "float32")


@pytest.fixture(autouse=True)
def stores_that_pytest_cleans_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def every_step(step: int) -> bool:
    return True


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_step_keeps_equal_bytes_and_counting_changes_nothing(
    setup: Setup, llama: Setup, name: str, kind: str
) -> None:
    chosen = setup if kind == "gpt2" else llama
    trials = [chosen.trial(name, {"start_step": 3, "dropout": 0.3})]
    counted = ActivationBytes(compute_step, every_step)
    ours, without = run_pack(chosen, trials, compute=counted), run_pack(chosen, trials)
    assert counted.counts == [counted.counts[0]] * STEPS
    assert counted.is_comparable
    assert counted.difference() is None
    assert ours.records == without.records
    assert bit_equal(ours.weights(0), without.weights(0))
    model = build_model(trials, chosen.base())
    with count_activation_bytes(model.base) as saved:
        model.losses(build_batches(trials, chosen.rows, torch.device("cpu")).training(0))
    assert counted.counts[0] == saved[0]


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_a_mixed_pack_in_micro_batches_keeps_equal_bytes(setup: Setup, again: bool) -> None:
    base = setup.base()
    checkpoint_activations(base, again)
    counted = ActivationBytes(compute_step, every_step)
    run_pack(setup, mixed_trials(setup, micro_batch_size=2), base=base, compute=counted)
    assert counted.counts == [counted.counts[0]] * STEPS
    assert counted.counts[0] > 0


def test_only_the_steps_that_are_due_are_counted(setup: Setup) -> None:
    counted = ActivationBytes(compute_step, lambda step: step in (1, 5))
    run_pack(setup, [setup.trial("lora")], compute=counted)
    assert len(counted.counts) == 2


def ask_for_gradients_of_the_embeddings(model: PackModel) -> None:
    """What a training script does for checkpointed activations, and forgets to undo."""
    model.base.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_(True))


def keep_all_activations(model: PackModel) -> None:
    checkpoint_activations(model.base, False)


def keep_what_an_adapter_reads(model: PackModel) -> None:
    """As LoRA-FA's A with a gradient would, by a tensor that is no part of the stack."""
    more = torch.zeros((), dtype=torch.float64, requires_grad=True)
    layer = next(module for module in model.base.modules() if hasattr(module, "base_layer"))
    layer.register_forward_pre_hook(lambda _, given: (given[0] + more * given[0], *given[1:]))


GROWN: dict[str, tuple[Callable[[PackModel], object], dict[str, Any]]] = {
    "embeddings": (ask_for_gradients_of_the_embeddings, {}),
    "checkpointing": (keep_all_activations, {"activation_checkpointing": True}),
    "an adapter's input": (keep_what_an_adapter_reads, {}),
}


@pytest.mark.parametrize("check_every", [1, None])
@pytest.mark.parametrize("what", GROWN)
def test_a_growing_graph_fails_the_pack_but_not_the_next(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, what: str, check_every: int | None
) -> None:
    grow, training = GROWN[what]
    settings: dict[str, Any] = {"measure_steps": 0, "report_every": 1, "check_every": check_every} | training
    first = [setup.trial(name, **settings) for name in ("lora_fa", "vera")]
    second = setup.trial("lora_fa", seed=1, **settings)
    seen = queue_with(setup, monkeypatch, [first, [second]], grow)
    for trial in first:
        end = seen.ended[trial.trial_id]
        assert end.status == "FAILED"
        assert end.reason.startswith("invariant violated: saved activations: a step keeps ")
        kept, at_first = (int(n.replace(",", "")) for n in end.reason.split() if n.replace(",", "").isdigit())
        assert kept > at_first > 0
        assert max(seen.records(trial)) == (FLIPPED_AFTER if check_every else STEPS - 1)
    assert seen.ended[second.trial_id].status == "FINISHED"
    assert_as_alone(setup, seen, second)


def test_a_frozen_lora_a_with_a_gradient_is_named(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = setup.trial("lora_fa", measure_steps=0, check_every=1)
    seen = queue_with(setup, monkeypatch, [[trial]], lambda model: first_stack(model).lora_A.requires_grad_(True))
    assert seen.ended[trial.trial_id].reason.endswith("lora_A' requires a gradient")


class _OfPositives(nn.Module):
    """Doubles what is positive, found by its place: how many there are depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        places = (x > 0).nonzero(as_tuple=True)
        return x.index_put(places, 2 * x[places])


def test_a_model_whose_shapes_depend_on_values_is_not_compared(setup: Setup) -> None:
    base = setup.base()
    chosen = _OfPositives()
    base.get_submodule("transformer.h.1.mlp").register_forward_hook(lambda *given: chosen(given[-1]))
    trials = [setup.trial("lora")]
    model, batches = build_model(trials, base), build_batches(trials, setup.rows, torch.device("cpu"))
    counted = ActivationBytes(compute_step, every_step)
    for step in range(STEPS):
        batch: Batch = batches.training(step)
        train_step(model, batch, one_worker, counted)
    assert len(set(counted.counts)) > 1
    assert not counted.is_comparable
    assert counted.difference() is None
