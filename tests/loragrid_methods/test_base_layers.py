"""One pass of text shows which linear layers of a base can be adapted, and why the others cannot."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from loragrid_methods.stacks.base_layers import BaseLayers, adaptable_layers
from loragrid_methods.stacks.targets import Targets
from tests.support import odd_bases
from tests.support.odd_bases import OddBase

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 8}


def roles(layers: BaseLayers, role: str) -> dict[str, str]:
    """Name -> reason of the other modules in the second layer or outside of all layers that have this role."""
    return {m.name: m.reason for m in layers.others if m.role == role and not m.name.startswith("layers.0.")}


def on_both_devices(build: Any) -> list[BaseLayers]:
    """The layers of a base with its weights and of the same base without them; planning knows the latter only."""
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            base: nn.Module = build()
        found.append(adaptable_layers(base, base.get_output_embeddings()))  # type: ignore[operator]
    return found


@pytest.mark.parametrize(
    ("part", "adaptable", "blocked"),
    [
        (odd_bases.Plain, ["up"], {}),
        (odd_bases.StackedExperts, [], {"": "StackedExperts multiplies weights of its own: router (4 x 8), gate_up"}),
        (odd_bases.FlatExperts, [], {"": "FlatExperts multiplies weights of its own: w1 (32 x 8)"}),
        (odd_bases.RoutedExperts, ["gate"], {"experts.3.w1": "the model decides from their values which tokens"}),
        (odd_bases.CapacityExperts, [], {"experts.1": "its input is not every token of every row"}),
        (odd_bases.ReadsTheWeight, [], {"dt": "the model uses its weight", "out": "in training mode the model uses"}),
        (odd_bases.TorchsAttention, [], {"attention.out_proj": "the model uses its weight without calling it"}),
        (odd_bases.LengthFirst, [], {"up": "its input is not every token of every row, in order"}),
        (odd_bases.TwoOutputs, [], {"router": "it returns more than its output"}),
        (odd_bases.SharedLayer, [], {"first.up": "it is the same layer as layers.1.part.second.up"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_cannot_be_adapted_is_found_with_its_reason(
    part: type[nn.Module], adaptable: list[str], blocked: dict[str, str]
) -> None:
    for layers in on_both_devices(lambda: OddBase(part)):
        names = [layer.name for layer in layers if layer.name.startswith("layers.1.")]
        assert names == ["layers.1.proj", *(f"layers.1.part.{name}" for name in adaptable)]
        found = roles(layers, "blocked")
        for name, reason in blocked.items():
            assert found[f"layers.1.part.{name}".rstrip(".")].startswith(reason)
        if not blocked:
            assert found == {}
            assert Targets().select(layers) == layers
            continue
        with pytest.raises(ValueError, match=r"some cannot be adapted: .*; name the layers to adapt, as in .*\[proj"):
            Targets().select(layers)
        assert len(Targets(target_modules=("layers.0.proj", "layers.1.proj")).select(layers)) == 2


def test_layers_that_get_no_gradient_are_not_adaptable() -> None:
    for layers in on_both_devices(lambda: OddBase(odd_bases.NoGradient)):
        assert [layer.name for layer in layers[2:]] == ["layers.1.proj", "layers.1.part.up"]
        unreached = roles(layers, "unreached")
        assert unreached["layers.1.part.chooser"] == "no gradient comes back to it"
        assert unreached["vision.fc"] == "text never passes through it"
        assert roles(layers, "other")["head"].startswith("it is the head")


def test_asking_changes_nothing_in_the_base() -> None:
    base = OddBase(odd_bases.ReadsTheWeight)
    classes = [type(module) for module in base.modules()]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adaptable_layers(base, base.head)
    assert [type(module) for module in base.modules()] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not base.training


def test_a_base_that_cannot_run_is_sorted_by_its_structure() -> None:
    base = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    layers = adaptable_layers(base)
    assert [layer.name for layer in layers] == ["0"]
    assert [(other.name, other.role) for other in layers.others] == [("1", "other")]


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        (transformers.MixtralConfig(**SMALL, **EXPERTS), "mlp.experts"),
        (transformers.Qwen3MoeConfig(**SMALL, **EXPERTS), "mlp.experts"),
        (transformers.OlmoeConfig(**SMALL, **EXPERTS), "mlp.experts"),
        (transformers.GraniteMoeConfig(**SMALL, **EXPERTS), "block_sparse_moe.experts"),
        (transformers.GptOssConfig(**SMALL, **EXPERTS, head_dim=8), "mlp.experts"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_all_linear_is_refused_if_experts_would_stay_out(config: Any, experts: str) -> None:
    for layers in on_both_devices(lambda: transformers.AutoModelForCausalLM.from_config(config)):
        with pytest.raises(ValueError, match=rf"model\.layers\.\*\.{experts} \(\w+ multiplies weights of its own"):
            Targets().select(layers)
        chosen = Targets(target_modules=("q_proj", "o_proj")).select(layers)
        assert len(chosen) == 4
        routers = {other.name.split(".")[-1] for other in layers.others if other.role == "blocked" and not other.holder}
        assert len(Targets(exclude_modules=tuple(routers)).select(layers)) == 8


def test_a_shared_experts_name_that_also_means_experts_is_refused() -> None:
    config = transformers.Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=8)
    for layers in on_both_devices(lambda: transformers.AutoModelForCausalLM.from_config(config)):
        for name in ("gate_proj", "down_proj"):
            with pytest.raises(ValueError, match=r"includes what cannot be adapted: .*mlp\.experts\."):
                Targets(target_modules=(name,)).select(layers)
        assert len(Targets(target_modules=("shared_expert.down_proj",)).select(layers)) == 2


def vision_language_base() -> Any:
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def test_only_the_language_model_of_a_vision_model_is_adapted() -> None:
    for layers in on_both_devices(vision_language_base):
        assert len(layers) == 14
        assert all(layer.name.startswith("model.language_model.layers.") for layer in layers)
        assert Targets().select(layers) == layers
        assert any("vision_tower" in other.name for other in Targets().left_out(layers))
        both = Targets(target_modules=("q_proj",))
        assert len(both.select(layers)) == 2
        assert {other.name.split(".")[1] for other in both.left_out(layers)} == {"vision_tower"}
        for names in (("fc1",), ("q_proj", "fc1"), r".*vision_tower.*fc1"):
            with pytest.raises(ValueError, match=r"training on text cannot change: model\.vision_tower\.\S*fc1"):
                Targets(target_modules=names).select(layers)


def test_limits_of_a_vision_model_concern_its_language_model() -> None:
    for layers in on_both_devices(vision_language_base):
        for left_out in (("vision_tower",), ("fc1",), r".*vision_tower.*", ("lm_head", "vision_tower")):
            assert Targets(exclude_modules=left_out).select(layers) == layers
        with pytest.raises(ValueError, match=r"'language_model' names model\.language_model, and as in PEFT that excl"):
            Targets(exclude_modules=("language_model",)).select(layers)
        for targets in ("all-linear", ("q_proj",)):  # the vision tower has a layer 3
            with pytest.raises(ValueError, match=r"no target is in layer 3; allowed: 0 to 1"):
                Targets(target_modules=targets, layers_to_transform=(0, 3)).select(layers)


def test_mambas_weights_that_its_mixer_reads_are_refused() -> None:
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    for layers in on_both_devices(lambda: transformers.MambaForCausalLM(config)):
        with pytest.raises(ValueError, match=r"mixer\.dt_proj \(the model uses its weight without calling it\)"):
            Targets().select(layers)
        with pytest.raises(ValueError, match=r"mixer\.out_proj \(in training mode the model uses its weight"):
            Targets(target_modules=("in_proj", "out_proj")).select(layers)
        assert len(Targets(target_modules=("in_proj",)).select(layers)) == 2


def test_a_read_that_the_configuration_switches_off_does_not_count() -> None:
    """BLOOM reads a weight in a branch that its configuration switches off; only what runs counts."""
    config = transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)
    for layers in on_both_devices(lambda: transformers.BloomForCausalLM(config)):
        assert len(Targets().select(layers)) == 4
    sliced = transformers.BloomConfig(
        vocab_size=40, hidden_size=16, n_layer=1, n_head=2, pretraining_tp=2, slow_but_exact=True
    )
    for layers in on_both_devices(lambda: transformers.BloomForCausalLM(sliced)):
        with pytest.raises(ValueError, match="uses its weight without calling it"):
            Targets().select(layers)
