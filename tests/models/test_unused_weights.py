"""Weights of a checkpoint that the architecture does not use are named, or refused if they show another model."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loragrid.config.experiment import ModelConfig
from loragrid.models.loading import load_base, unused_weights
from loragrid.models.unused_weights import names_in_short, sentence_about

LAYER = "model.layers.1.self_attn.q_proj"


def with_extra(folder: Path, target: Path, extra: dict[str, Tensor]) -> ModelConfig:
    shutil.copytree(folder, target)
    save_file(load_file(folder / "model.safetensors") | extra, target / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(name=str(target), dtype="float32")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.layers.2.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"], ["model.layers.2.*"]),
        (["model.layers.2.a.weight", "model.layers.3.a.weight"], ["model.layers.2.*", "model.layers.3.*"]),
        (["mtp.layers.0.eh_proj.weight", "mtp.norm.weight"], ["mtp.*"]),
        (["v_head.summary.weight", "v_head.summary.bias"], ["v_head.*"]),
        (["vision_tower.patch_embedding.weight"], ["vision_tower.*"]),
        (["scale"], ["scale"]),
        (["model.layers.0.self_attn.masked_bias"], ["model.layers.0.self_attn.masked_bias"]),  # as in GPT-J's file
        (["model.layers.0.self_attn.attn.bias"], ["model.layers.0.self_attn.attn.*"]),
        (["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"], []),  # transformers' own list
    ],
    ids=str,
)
def test_weights_that_no_layer_misses_are_named(
    tiny_llama_dir: Path, tmp_path: Path, names: list[str], said: list[str]
) -> None:
    model = with_extra(tiny_llama_dir, tmp_path / "base", {name: torch.ones(3) for name in names})
    assert unused_weights(model) == said
    load_base(model)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.lora_A.weight",
        f"{LAYER}.lora_B.default.weight",
        f"{LAYER}.lora_magnitude_vector",
        f"base_model.model.{LAYER}.lora_embedding_A",
        f"{LAYER}.vera_lambda_b",
        f"{LAYER}.base_layer.bias",
        "lm_head.modules_to_save.default.weight",
    ],
)
def test_weights_of_an_adapter_are_refused(tiny_llama_dir: Path, tmp_path: Path, name: str) -> None:
    model = with_extra(tiny_llama_dir, tmp_path / "base", {name: torch.zeros(3)})
    for load in (load_base, unused_weights):
        with pytest.raises(ValueError, match=r"model\.name: .*hold those of an adapter .*merge_and_unload"):
            load(model)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.bias",
        f"{LAYER}.weight_scale_inv",
        "model.layers.1.self_attn.q_norm.weight",
        "model.norm.bias",
        "lm_head.bias",
        "layers.1.mlp.down_proj.bias",
    ],
)
def test_weights_that_a_layer_computes_without_are_refused(tiny_llama_dir: Path, tmp_path: Path, name: str) -> None:
    model = with_extra(tiny_llama_dir, tmp_path / "base", {name: torch.ones(3)})
    for load in (load_base, unused_weights):
        with pytest.raises(ValueError, match=r"1 weight of layers that LlamaForCausalLM computes without: "):
            load(model)


def test_a_bias_of_zeros_is_only_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = with_extra(tiny_llama_dir, tmp_path / "base", {f"{LAYER}.bias": torch.zeros(32)})
    assert unused_weights(model) == [f"{LAYER}.bias"]
    load_base(model)


def test_a_usual_checkpoint_has_none(tiny_llama_dir: Path, tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    assert unused_weights(ModelConfig(name=str(tiny_llama_dir))) == []
    # Older GPT-2 checkpoints hold the causal mask.
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}
    model = with_extra(tiny_gpt2_dir, tmp_path / "base", masks)
    assert unused_weights(model) == []
    load_base(model)


def test_names_are_short() -> None:
    assert names_in_short([f"model.layers.{n}.*" for n in (2, 3, 4)]) == "model.layers.{2..4}.*"
    assert names_in_short(["a.2.b", "a.7.b", "c"]) == "a.{2, 7}.b, c"
    assert names_in_short([*"abcdefgh"]) == "a, b, c, d, e, f, and 2 more"
    assert sentence_about("base", ["mtp.*"]) == "model base: does not use these weights of its checkpoint: mtp.*"
