"""`target_modules` selects the layers that PEFT would select, and a name that matches none is refused."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loragrid_methods import LayerShape
from loragrid_methods.stacks.targets import Targets, adaptable_layers, select_layers
from tests.support.pack_training import TinyModel

LAYERS = [
    LayerShape(name=f"blocks.{block}.{name}", in_features=4, out_features=4)
    for block in range(12)
    for name in ("attention.q_proj", "attention.v_proj", "mlp.up_proj")
]


CASES: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear"},
    {"target_modules": ("q_proj",)},
    {"target_modules": ("q_proj", "self_attn.v_proj")},
    {"target_modules": r".*layers\.1\..*_proj"},
    {"target_modules": ("model.layers.0.mlp.up_proj",)},
    {"target_modules": ("q_proj", "v_proj"), "layers_to_transform": 1},
    {"target_modules": ("q_proj", "v_proj"), "layers_to_transform": (0, 1)},
    {"target_modules": ("q_proj", "up_proj"), "layers_to_transform": (1,), "layers_pattern": "layers"},
    {"target_modules": ("q_proj", "up_proj"), "layers_to_transform": (0,), "layers_pattern": ("h", "layers")},
    {"target_modules": ("q_proj", "model.layers.0.mlp.up_proj"), "layers_to_transform": (1,)},
    {"target_modules": "all-linear", "exclude_modules": ("down_proj",)},
    {"target_modules": "all-linear", "exclude_modules": ("self_attn.q_proj", "model.layers.0.mlp.up_proj")},
    {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    {"target_modules": ("q_proj", "v_proj"), "exclude_modules": ("layers.0.self_attn.v_proj",)},
    {"target_modules": r".*_proj", "exclude_modules": r".*mlp.*"},
    {"target_modules": ("q_proj", "k_proj"), "layers_to_transform": (0,), "exclude_modules": ("k_proj",)},
]
"""Settings that PEFT accepts for a Llama, too."""


def peft_config(settings: dict[str, Any]) -> LoraConfig:
    given: dict[str, Any] = {key: [*value] if isinstance(value, tuple) else value for key, value in settings.items()}
    return LoraConfig(**given)


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_selection_is_pefts(tiny_llama_dir: Path, settings: dict[str, Any]) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    ours = Targets(**settings).select(adaptable_layers(base, base.get_output_embeddings()))
    model = get_peft_model(base, peft_config(settings))
    theirs = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    assert [f"base_model.model.{layer.name}" for layer in ours] == theirs


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "q_proj"},
        {"target_modules": ("self_attn",)},
        {"target_modules": ("norm",)},
        {"target_modules": r".*self_attn.*"},
        {"target_modules": r".*layers\.1\..*"},
        {"target_modules": r".*_proj", "layers_to_transform": (0,)},
        {"target_modules": ("q_proj",), "layers_pattern": "layers"},
        {"target_modules": ("q_proj",), "layers_to_transform": (7,)},
        {"target_modules": ("q_proj",), "layers_to_transform": (0,), "layers_pattern": "h"},
        {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)},
    ],
    ids=str,
)
def test_what_peft_refuses_is_refused(tiny_llama_dir: Path, settings: dict[str, Any]) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    layers = adaptable_layers(base, base.get_output_embeddings())
    with pytest.raises(ValueError, match=r"^(target_modules|layers_to_transform|layers_pattern): "):
        Targets(**settings).select(layers)
    with pytest.raises(ValueError):  # noqa: PT011  # PEFT's own words
        get_peft_model(base, peft_config(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_proj", "q_porj")}, r"'q_porj' matches no layer; .*Did you mean 'q_proj'\?"),
        ({"target_modules": ("q_proj", "q_proj")}, r"target_modules: 'q_proj' is named twice"),
        ({"target_modules": ("q_proj", "")}, r"target_modules: '' is not allowed"),
        ({"target_modules": "q_proj, v_proj"}, r"so list last parts: \[q_proj, v_proj\]"),
        ({"target_modules": ("lm_head",)}, r"lm_head \(it is the head, whose weight the loss multiplies"),
        ({"target_modules": r".*(q_proj|lm_head)"}, r"lm_head \(it is the head"),
        ({"target_modules": ("embed_tokens", "q_proj")}, r"embed_tokens \(it is no linear layer \(Embedding\)\)"),
        ({"exclude_modules": ("w_proj",)}, r"exclude_modules: 'w_proj' excludes none of the layers"),
        ({"exclude_modules": r"(w_proj"}, r"exclude_modules: '\(w_proj' is not a valid regular expression"),
        ({"layers_to_transform": (0, 9)}, r"layers_to_transform: no target is in layer 9; allowed: 0 to 1"),
        ({"layers_to_transform": ()}, r"layers_to_transform: \(\) is not allowed"),
        ({"layers_to_transform": -1}, r"layers_to_transform: -1 is not allowed; .* counted from 0"),
        ({"layers_to_transform": (1, 1)}, r"layers_to_transform: \(1, 1\) is not allowed; .* each once"),
        ({"target_modules": r".*_proj", "layers_to_transform": 0}, r"write the numbers into the expression"),
        ({"layers_pattern": "layers"}, r"layers_pattern: .* only together with layers_to_transform"),
    ],
    ids=str,
)
def test_a_refusal_says_what_to_write_instead(tiny_llama_dir: Path, settings: dict[str, Any], message: str) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with pytest.raises(ValueError, match=message):
        Targets(**settings).select(adaptable_layers(base, base.get_output_embeddings()))


@pytest.mark.parametrize(
    "excluded",
    [
        ("mlp",),
        ("self_attn",),
        ("model.layers.0",),
        ("layers",),
        ("model",),
        ("q_proj", "mlp"),
        r"model\.layers\.0",
        r".*(mlp|q_proj)",
        r".*\.1",
    ],
    ids=str,
)
def test_excluding_a_container_excludes_no_layer_and_is_refused(tiny_llama_dir: Path, excluded: Any) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    layers = adaptable_layers(base, base.get_output_embeddings())
    with pytest.raises(ValueError, match=r"as in PEFT that excludes none of the layers inside it") as refused:
        Targets(exclude_modules=excluded).select(layers)
    remedy = str(refused.value).rpartition("exclude_modules: '")[2].removesuffix("'")
    if excluded not in [("layers",), ("model",)]:  # these leave no layer
        assert len(Targets(exclude_modules=remedy).select(layers)) < len(layers)


@pytest.mark.parametrize("excluded", [("norm",), ("embed_tokens",), r".*layernorm", ("act_fn",)], ids=str)
def test_excluding_what_is_no_target_is_refused(tiny_llama_dir: Path, excluded: Any) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    layers = adaptable_layers(base, base.get_output_embeddings())
    with pytest.raises(ValueError, match=r"excludes none of the layers that target_modules selects; .*down_proj"):
        Targets(exclude_modules=excluded).select(layers)


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ("lm_head",)},
        {"exclude_modules": ("mlp.up_proj", "lm_head")},
        {"exclude_modules": r".*\.mlp\..*"},
        {"exclude_modules": r".*layers\.0.*"},
        {"target_modules": r".*layers\.\d+\.mlp.*", "exclude_modules": r".*(mlp|act_fn)"},
    ],
    ids=str,
)
def test_an_exclusion_with_an_effect_is_accepted(tiny_llama_dir: Path, settings: dict[str, Any]) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert Targets(**settings).select(adaptable_layers(base, base.get_output_embeddings()))


def test_layer_numbers_limit_all_linear_too(tiny_llama_dir: Path) -> None:
    """PEFT refuses this pair of settings; here it means what it says."""
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    chosen = Targets(layers_to_transform=1).select(adaptable_layers(base, base.get_output_embeddings()))
    assert len(chosen) == 7
    assert all(layer.name.startswith("model.layers.1.") for layer in chosen)


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
