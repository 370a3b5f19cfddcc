"""`target_modules` selects the layers that PEFT would select, and a name that matches none is refused."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loragrid_methods import LayerShape
from loragrid_methods.stacks.targets import adaptable_layers, select_layers
from tests.support.pack_training import TinyModel

LAYERS = [
    LayerShape(name=f"blocks.{block}.{name}", in_features=4, out_features=4)
    for block in range(12)
    for name in ("attention.q_proj", "attention.v_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj"], ["q_proj", "self_attn.v_proj"], r".*layers\.1\..*_proj", ["model.layers.0.mlp.up_proj"]],
    ids=str,
)
def test_the_selection_is_pefts(tiny_llama_dir: Path, targets: str | list[str]) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    ours = select_layers(targets, adaptable_layers(base, base.get_output_embeddings()))
    model = get_peft_model(base, LoraConfig(target_modules=targets))
    theirs = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    assert [f"base_model.model.{layer.name}" for layer in ours] == theirs


def test_layers_have_their_shapes_whichever_way_the_weight_is_stored(tiny_gpt2_dir: Path) -> None:
    gpt2: Any = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir)
    layers = {layer.name: layer for layer in adaptable_layers(gpt2, gpt2.get_output_embeddings())}
    assert layers["transformer.h.0.attn.c_attn"] == LayerShape(
        name="transformer.h.0.attn.c_attn", in_features=32, out_features=96, transposed=True
    )
    assert "lm_head" not in layers
    tiny = {layer.name: layer for layer in adaptable_layers(TinyModel())}
    assert tiny["blocks.1.up_proj"] == LayerShape(name="blocks.1.up_proj", in_features=12, out_features=20)
    assert "head" in tiny


def test_a_last_part_matches_whole_parts_of_a_name_only() -> None:
    assert len(select_layers(("q_proj",), LAYERS)) == 12
    assert [layer.name for layer in select_layers(r"blocks\.1\..*", LAYERS)] == [
        f"blocks.1.{name}" for name in ("attention.q_proj", "attention.v_proj", "mlp.up_proj")
    ]
    with pytest.raises(ValueError, match="'proj' matches no layer; the model's layers end in: q_proj, up_proj, v_proj"):
        select_layers(("proj",), LAYERS)


def test_selection_keeps_the_models_order_and_names_no_layer_twice() -> None:
    chosen = select_layers(("up_proj", "q_proj", "blocks.0.mlp.up_proj"), LAYERS)
    assert chosen == [layer for layer in LAYERS if not layer.name.endswith("v_proj")]


@pytest.mark.parametrize("targets", ["q_proj", ("q_proj", "gate_proj"), (), ""], ids=str)
def test_an_unmatched_target_is_an_error_that_lists_layer_names(targets: str | tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"target_modules: .* matches no layer; .* end in: q_proj, up_proj, v_proj"):
        select_layers(targets, LAYERS)


def test_a_broken_regular_expression_is_named() -> None:
    with pytest.raises(ValueError, match=r"target_modules: '\(q_proj' is not a valid regular expression"):
        select_layers("(q_proj", LAYERS)
