"""Model FLOPs equal counts by hand; a device's limit is checked with a fake clock."""

import itertools
import shutil
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM

from loragrid.planning.flops import (
    NUM_PRODUCTS,
    SMALLEST_SIDE,
    ModelShape,
    device_limit,
    measure_limit,
    model_flops,
    passes_of,
)
from loragrid.planning.solo_run import measure_solo
from loragrid.training.assembly import build_model
from tests.support.small_packs import make_setup

SHAPE = ModelShape(num_layer_weights=100, num_head_weights=30, attention_width=8)


def test_operations_are_those_counted_by_hand() -> None:
    # Two rows of 3 and 5 tokens with 4 labels.
    linear, attention = 100 * 8 + 30 * 4, 8 * (3 * 3 + 5 * 5)
    assert model_flops(SHAPE, [3, 5], 4, 1) == 2 * linear + 2 * attention
    assert model_flops(SHAPE, [3, 5], 4, 2) == 4 * linear + 6 * attention
    assert model_flops(SHAPE, [3, 5], 4, 3) == 6 * linear + 6 * attention


def test_shapes_and_passes_are_the_models_and_the_methods(tiny_gpt2_dir: Path, chat_jsonl: Path) -> None:
    setup = make_setup(tiny_gpt2_dir, chat_jsonl, "float32")
    shape = ModelShape.of(setup.base())
    assert shape is not None
    # Two layers of width 32: attention in and out, feed-forward up and down.
    assert shape.num_layer_weights == 2 * 32 * (96 + 32 + 128 + 128)
    assert shape.num_head_weights == 300 * 32
    assert shape.attention_width == 2 * 32
    found = {
        name: passes_of(build_model([setup.trial(name)], setup.base()).pack) for name in ("frozen", "vera", "full")
    }
    assert found == {"frozen": 1, "vera": 2, "full": 3}


def test_a_base_without_attention_is_measured_without_counting_operations(
    tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_gpt2_dir, tmp_path / "mamba"))
    (folder / "model.safetensors").unlink()
    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder)
    setup = make_setup(folder, chat_jsonl, "float32")
    assert ModelShape.of(setup.base()) is None
    figures = measure_solo(setup.trial("full"), setup.base(), setup.rows, num_steps=1)
    assert figures["time/step_seconds"] > 0
    assert [key for key in figures if "flops" in key or "limit" in key] == []


def test_the_limit_divides_a_products_operations_by_its_shortest_time() -> None:
    ticks = itertools.count()
    limit = measure_limit(torch.device("cpu"), torch.float32, clock=lambda: float(next(ticks)))
    assert limit.flops_per_second == 2 * SMALLEST_SIDE**3
    assert limit.seconds == 2 * (NUM_PRODUCTS + 1)  # the first product is not timed to its end


def test_the_limit_is_measured_once_without_drawing_from_trainings_generator() -> None:
    before = torch.get_rng_state()
    first = device_limit(torch.device("cpu"), torch.float32)
    assert device_limit(torch.device("cpu"), torch.float32) is first
    assert first.flops_per_second > 1e8
    assert torch.equal(torch.get_rng_state(), before)
