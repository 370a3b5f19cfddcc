"""Activation checkpointing changes which activations are kept, but no bit of any result."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from loragrid.models.activation_checkpointing import checkpoint_activations, decoder_layers
from loragrid.models.loading import load_meta_model
from loragrid.planning.memory_estimate import estimate_memory
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.meters import count_activation_bytes
from tests.support.queue_runs import queue
from tests.support.small_packs import Setup, bit_equal, make_setup, mixed_trials, run_pack


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def setup(request: pytest.FixtureRequest, tiny_gpt2_dir: Path, tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup({"gpt2": tiny_gpt2_dir, "llama": tiny_llama_dir}[request.param], chat_jsonl, "float32")


def checkpointed(base: PreTrainedModel) -> PreTrainedModel:
    checkpoint_activations(base, True)
    return base


@pytest.mark.parametrize("name", ["mixed", "full"])
def test_curves_and_weights_are_the_same_to_the_bit(setup: Setup, name: str) -> None:
    trials = mixed_trials(setup) if name == "mixed" else [setup.trial("full", lr=1e-3)]
    plain = run_pack(setup, trials)
    again = run_pack(setup, trials, base=checkpointed(setup.base()))
    assert again.records == plain.records
    for member in range(len(trials)):
        assert bit_equal(again.weights(member), plain.weights(member))


def saved_bytes(setup: Setup, enabled: bool) -> int:
    trial, base = setup.trial("lora"), setup.base()
    checkpoint_activations(base, enabled)
    model = build_model([trial], base)
    with count_activation_bytes(base) as saved:
        model.losses(build_batches([trial], setup.rows, torch.device("cpu")).training(0))
    return saved[0]


def test_a_layer_keeps_its_input_alone(setup: Setup) -> None:
    rows, length, size, width = 4, setup.rows.train.input_ids.shape[1], 4, 32
    inputs = len(list(decoder_layers(setup.base()))) * rows * length * width * size
    kept = saved_bytes(setup, True)
    # Beside them: the last norm's input and the loss's gradient, and small change.
    assert inputs <= kept <= 3.5 * inputs
    assert kept < 0.4 * saved_bytes(setup, False)


def test_it_can_be_switched_off_again(setup: Setup) -> None:
    base = checkpointed(setup.base())
    checkpoint_activations(base, True)
    checkpoint_activations(base, False)
    assert all("forward" not in vars(layer) for layer in decoder_layers(base))


def test_the_plan_knows_of_it(setup: Setup) -> None:
    base, method = load_meta_model(setup.model), setup.trial("lora").method
    plain, again = (
        estimate_memory(base, [method], num_rows=4, length=64, activation_checkpointing=enabled)
        for enabled in (False, True)
    )
    assert again.activations < 0.4 * plain.activations
    assert again.total < plain.total


def test_a_queue_checkpoints_only_packs_that_ask_for_it(setup: Setup) -> None:
    plain = setup.trial("lora", measure_steps=1)
    again = setup.trial("lora", measure_steps=1, activation_checkpointing=True)
    seen = queue(setup, [[plain], [again], [setup.trial("vera", measure_steps=1)]])
    key = "memory/saved_activation_bytes"
    assert seen.figures[again.trial_id][key] < 0.4 * seen.figures[plain.trial_id][key]
    assert seen.records(again) == seen.records(plain)
    assert seen.num_loaded() == 1
