"""Memory by part: every figure equals an independent count, and every byte is in exactly one part."""

import gc
from pathlib import Path

import pytest
import torch

from loragrid.planning.memory_parts import loss_bytes, resident_parts
from loragrid.planning.solo_run import measure_solo
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.loss import CHUNK_ROWS
from loragrid.training.meters import LiveBytes, bytes_of, count_activation_bytes, peak_memory, reset_peak_memory
from loragrid.training.step import Batch, compute_step, one_worker
from loragrid_methods import method_names
from loragrid_methods.stacks.targets import adaptable_layers
from tests.support.small_packs import Setup, make_setup

STEPS, WIDTH = 8, 32
FLOAT32_BYTES, FLOAT64_BYTES = 4, 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def setup(request: pytest.FixtureRequest, tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_llama_dir, chat_jsonl, request.param)


@pytest.fixture(scope="module")
def single(tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_llama_dir, chat_jsonl, "float32")


@pytest.mark.parametrize("name", method_names())
def test_every_part_follows_from_the_methods_own_parameter_counts(setup: Setup, name: str) -> None:
    base, trial = setup.base(), setup.trial(name)
    layers, num_base = adaptable_layers(base, base.get_output_embeddings()), base.num_parameters()
    counts = trial.method.num_parameters(layers, num_base)
    buffers = bytes_of(base.buffers())
    figures = resident_parts(build_model([trial], base))

    assert figures["memory/base_bytes"] == num_base * base.dtype.itemsize + buffers
    in_base = name == "full" and base.dtype == torch.float32
    assert figures["memory/adapter_bytes"] == (0 if in_base else FLOAT32_BYTES * (counts.stored + counts.working))
    assert figures["memory/gradient_bytes"] == FLOAT32_BYTES * counts.trainable
    # Step count, decay and clipping norm; multipliers; learning rates; the stop mark.
    settings = FLOAT64_BYTES * (3 + len(trial.method.trained) + STEPS) + 1
    assert figures["memory/optimizer_bytes"] == 2 * FLOAT32_BYTES * counts.trainable + settings


@pytest.mark.parametrize("name", method_names())
def test_parts_are_all_a_pack_holds_and_steps_add_nothing(setup: Setup, name: str) -> None:
    base, trial = setup.base(), setup.trial(name)
    batch = build_batches([trial], setup.rows, CPU).training(0)
    base_weights = bytes_of(base.parameters())
    with LiveBytes() as live:
        model = build_model([trial], base)
        figures = resident_parts(model)
        gc.collect()
        # Full fine-tuning makes the base's weights anew, and the old ones are gone.
        made_anew = base_weights if name == "full" else 0
        # What torch makes of Python's numbers is not seen being made: rates, decay, clipping norm, multipliers.
        unseen = FLOAT64_BYTES * (STEPS + 2 + len(model.optimizer.blocks))
        held = sum(figures.values()) - figures["memory/base_bytes"] + made_anew - unseen
        assert live.now == held
        compute_step(model, batch, model.learning_rates[0], one_worker)
        model.pack.after_step(1)
        gc.collect()
        assert live.now == held
    assert resident_parts(model) == figures


def test_members_of_a_pack_share_veras_projections_and_nothing_else(single: Setup) -> None:
    one = resident_parts(build_model([single.trial("vera")], single.base()))
    two = resident_parts(build_model([single.trial("vera", seed=seed) for seed in (0, 1)], single.base()))
    method, base = single.trial("vera").method, single.base()
    shared = method.num_parameters(adaptable_layers(base, base.get_output_embeddings())).shared * FLOAT32_BYTES
    assert two["memory/adapter_bytes"] - shared == 2 * (one["memory/adapter_bytes"] - shared) > 0
    assert two["memory/base_bytes"] == one["memory/base_bytes"]
    assert two["memory/gradient_bytes"] == 2 * one["memory/gradient_bytes"]


@pytest.mark.parametrize("num_rows", [40, CHUNK_ROWS, 2 * CHUNK_ROWS])
def test_the_loss_holds_one_chunks_logits_and_values_from_them(single: Setup, num_rows: int) -> None:
    model = build_model([single.trial("lora")], single.base())
    columns = num_rows // 40
    batch = Batch(
        input_ids=torch.zeros(40, columns + 1, dtype=torch.long),
        label_positions=torch.arange(columns).repeat(40, 1),
        label_targets=torch.zeros(40, columns, dtype=torch.long),
        num_labels=torch.ones(1, dtype=torch.float64),
    )
    found = loss_bytes(model, batch)
    chunk = min(40 * columns, CHUNK_ROWS)
    vocabulary = model.base.get_output_embeddings().out_features
    # Logits, and beside them at most the softmax and its copy; hidden states of the labels, and single numbers per row.
    logits = FLOAT32_BYTES * chunk * vocabulary
    small = FLOAT32_BYTES * 40 * columns * WIDTH + 16 * FLOAT64_BYTES * 40 * columns
    assert 2 * logits <= found <= 3 * logits + small


def test_a_loss_counted_before_a_step_leaves_its_gradients_alone(single: Setup) -> None:
    for name in ("lora", "full", "frozen"):
        trial = single.trial(name)
        model = build_model([trial], single.base())
        batch = build_batches([trial], single.rows, CPU).training(0)
        model.pack.gradient_buffer.fill_(0.5)
        assert loss_bytes(model, batch) > 0
        assert (model.pack.gradient_buffer == 0.5).all()


@pytest.mark.parametrize("name", method_names())
def test_the_parts_and_the_loss_never_exceed_a_steps_peak(single: Setup, name: str) -> None:
    base, trial = single.base(), single.trial(name)
    batch = build_batches([trial], single.rows, CPU).training(0)
    with LiveBytes() as live:
        model = build_model([trial], base)
        figures = resident_parts(model)
        with count_activation_bytes(base) as saved:
            losses = model.losses(batch)
        del losses
        gc.collect()
        live.peak = live.now
        compute_step(model, batch, model.learning_rates[0], one_worker)
    made_anew = figures["memory/base_bytes"] if name == "full" else 0.0
    resident = sum(figures.values()) - figures["memory/base_bytes"] + made_anew
    # Saved tensors may be the batch's own, or the rotary table: made outside.
    outside = bytes_of([*base.buffers(), batch.input_ids, batch.label_positions, batch.label_targets])
    assert resident + saved[0] - outside <= live.peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only there is memory allocated by torch alone")
@pytest.mark.parametrize("name", method_names())
def test_a_gpus_allocator_holds_the_parts_and_evaluation_peaks_lower(single: Setup, name: str) -> None:
    device = torch.device("cuda")
    trial = single.trial(name)
    base = single.base()
    base.to(device)  # type: ignore[arg-type]  # transformers narrows torch's own signature
    figures = measure_solo(trial, base, single.rows, num_steps=1)
    assert figures["memory/eval_peak_allocated_bytes"] < figures["memory/peak_allocated_bytes"]
    assert figures["memory/eval_peak_allocated_bytes"] <= figures["memory/eval_peak_reserved_bytes"]
    gc.collect()
    reset_peak_memory(device)
    del base
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    base = single.base()
    base.to(device)  # type: ignore[arg-type]
    model = build_model([trial], base)
    gc.collect()
    held = torch.cuda.memory_allocated(device) - before
    parts = resident_parts(model)
    num_tensors = sum(1 for _ in base.parameters()) + sum(1 for _ in base.buffers()) + 30
    assert 0 <= held - sum(parts.values()) <= 512 * num_tensors  # the allocator's blocks
    batch = build_batches([trial], single.rows, device).training(0)
    assert loss_bytes(model, batch) > 0
    assert peak_memory(device)["memory/peak_allocated_bytes"] >= before + held
