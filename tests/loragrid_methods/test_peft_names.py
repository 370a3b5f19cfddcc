"""The exported `target_modules` are resolved by PEFT to exactly the modules that were adapted."""

import json
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from loragrid_methods.stacks.pack import AdapterPack
from loragrid_methods.stacks.peft_format import peft_adapter
from loragrid_methods.stacks.peft_names import layer_number, shortest_names
from tests.support import odd_bases
from tests.support.odd_bases import OddBase
from tests.support.pack_training import small_method


def resolved_by_peft(target_modules: str | list[str], names: list[str]) -> list[str]:
    config = LoraConfig(target_modules=target_modules)
    return [name for name in names if check_target_module_exists(config, name)]


@pytest.mark.parametrize(
    ("chosen", "others", "expected"),
    [
        (["a.0.q", "a.1.q", "a.0.v"], ["a.0.k", "head"], ["q", "v"]),
        (["text.0.q", "text.1.q"], ["vision.0.q", "vision.9.q"], ["text.0.q", "1.q"]),
        (["q"], ["deep.q"], "q"),
        (["a.q", "a.v"], ["b.a.q", "k"], r"a\.q|a\.v"),
        (["a.b"], ["xa.b"], ["a.b"]),
    ],
)
def test_names_are_short_and_exact(chosen: list[str], others: list[str], expected: str | list[str]) -> None:
    names = shortest_names(chosen, others)
    assert names == expected
    assert resolved_by_peft(names, [*chosen, *others]) == chosen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers_to_transform": 1},
        {"exclude_modules": ("layers.0.part.up",)},
        {"target_modules": ("proj",), "layers_to_transform": (0,), "layers_pattern": "layers"},
        {"target_modules": r"layers\.\d\.part\.up"},
    ],
    ids=str,
)
def test_an_export_names_exactly_the_adapted_modules(settings: dict[str, Any]) -> None:
    base = OddBase(odd_bases.Plain)
    names = [name for name, _ in base.named_modules() if name]
    if settings == {"layers_to_transform": 1}:  # "layers.1.proj" has no part before "layers", as PEFT wants
        settings = {**settings, "layers_pattern": "layers"}
    pack = AdapterPack(base, [(small_method("lora", **settings), 0)], output_layer=base.head)
    config, tensors = peft_adapter(pack, 0, "base")
    adapted = [key.removeprefix("base_model.model.").partition(".lora_A")[0] for key in tensors if "lora_A" in key]
    assert set(resolved_by_peft(config["target_modules"], names)) == {*adapted} == pack.adapted.keys()
    assert not {"layers_to_transform", "exclude_modules", "layers_pattern"} & config.keys()


def test_an_export_leaves_out_what_text_never_reaches() -> None:
    base = OddBase(odd_bases.Plain)
    names = [name for name, _ in base.named_modules() if name]
    pack = AdapterPack(base, [(small_method("vera"), 0)], output_layer=base.head)
    config, _ = peft_adapter(pack, 0, "base")
    assert [name for name in resolved_by_peft(config["target_modules"], names) if name.startswith("vision")] == []


def test_peft_loads_the_attention_adapter_of_a_mixture(tmp_path: Any) -> None:
    """PEFT rewrites some names for a mixture of experts; those of attention stay, and no key is missing."""
    from peft import PeftModel
    from safetensors.torch import save_file

    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    base: Any = transformers.MixtralForCausalLM(config)
    method = small_method("lora", exclude_modules=("experts", "gate"))
    pack = AdapterPack(base, [(method, 0)], output_layer=base.lm_head)
    for stack in pack.stacks():
        nn.init.normal_(stack.get_parameter("lora_B"))
    settings, tensors = peft_adapter(pack, 0, "base")
    assert settings["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        ours = base(input_ids=ids).logits
        pack.detach()
        loaded = PeftModel.from_pretrained(base, str(tmp_path))
        theirs = loaded(input_ids=ids).logits
    trained = {name for name, _ in loaded.named_parameters() if "lora_A" in name}
    assert len(trained) == len(pack.layers) == 8
    assert (ours - theirs).abs().max().item() <= 1e-5 < ours.abs().max().item()


@pytest.mark.parametrize(
    ("name", "pattern", "number"),
    [
        ("model.layers.3.mlp.experts.5.w1", None, 3),
        ("transformer.h.11.attn.c_attn", None, 11),
        ("layers.3.proj", None, None),
        ("layers.3.proj", "layers", 3),
        ("a.blocks.2.layers.3.proj", "layers", 3),
        ("a.blocks.2.layers.3.proj", ("h", "blocks"), 2),
        ("model.norm", None, None),
        ("model.layers.3", None, None),
    ],
)
def test_the_number_of_a_layer_is_pefts(name: str, pattern: Any, number: int | None) -> None:
    assert layer_number(name, pattern) == number
    last = name.rpartition(".")[2]
    for asked in (2, 3, 5, 11):
        config = LoraConfig(
            target_modules=[last],
            layers_to_transform=[asked],
            layers_pattern=[*pattern] if isinstance(pattern, tuple) else pattern,
        )
        assert bool(check_target_module_exists(config, name)) is (asked == number)
