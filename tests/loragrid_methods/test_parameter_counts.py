"""Numbers of trainable parameters, computed only from known models' configurations, equal the published tables."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from loragrid_methods import LayerShape, ParameterCount, get_method, method_names
from loragrid_methods.stacks.pack import AdapterPack
from loragrid_methods.stacks.targets import adaptable_layers
from tests.support.pack_training import small_method

QUERY_VALUE = ("query", "value")
Q_V = ("q_proj", "v_proj")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

TABLE: list[tuple[str, tuple[str, ...], str, int, int]] = [
    ("roberta-base", QUERY_VALUE, "lora", 8, 294_912),
    ("roberta-base", QUERY_VALUE, "vera", 1024, 43_008),
    ("roberta-large", QUERY_VALUE, "lora", 8, 786_432),
    ("roberta-large", QUERY_VALUE, "vera", 256, 61_440),
    ("gpt2-medium", ("c_attn",), "lora", 4, 393_216),  # LoRA's table prints 0.35M, which the shapes do not give
    ("gpt3", Q_V, "lora", 1, 4_718_592),
    ("llama-7b", SEVEN, "lora", 64, 159_907_840),
    ("llama-7b", SEVEN, "vera", 256, 1_417_216),
    ("llama-3.2-3b", Q_V, "lora", 32, 9_175_040),
    ("llama-3.2-3b", Q_V, "lora_fa", 32, 3_670_016),
    ("llama-3.2-3b", Q_V, "vera", 256, 129_024),
]


def configuration(model: str) -> Any:
    """The configuration of a published model, written out: no network."""
    if model == "roberta-base":
        return transformers.RobertaConfig()
    if model == "roberta-large":
        return transformers.RobertaConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        )
    if model == "gpt2-medium":
        return transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    if model == "gpt3":  # OPT-175B has GPT-3's shapes, with separate projections
        return transformers.OPTConfig(
            hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=49152, word_embed_proj_dim=12288
        )
    if model == "llama-7b":
        return transformers.LlamaConfig(
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008
        )
    assert model == "llama-3.2-3b"
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        intermediate_size=8192,
        tie_word_embeddings=True,
    )


@cache
def layers_of(model: str) -> tuple[LayerShape, ...]:
    """The adaptable layers of the model, built on the meta device without a single weight."""
    with torch.device("meta"):
        built: nn.Module = transformers.AutoModel.from_config(configuration(model))
    assert all(parameter.is_meta for parameter in built.parameters())
    return tuple(adaptable_layers(built))


def count(model: str, targets: tuple[str, ...], name: str, rank: int) -> ParameterCount:
    return small_method(name, rank=rank, target_modules=targets).num_parameters(layers_of(model))


@pytest.mark.parametrize(("model", "targets", "name", "rank", "trainable"), TABLE)
def test_trainable_parameters_are_those_of_the_table(
    model: str, targets: tuple[str, ...], name: str, rank: int, trainable: int
) -> None:
    assert count(model, targets, name, rank).trainable == trainable


@pytest.mark.parametrize("name", ["lora_plus", "delta_lora"])
@pytest.mark.parametrize(
    ("model", "targets", "rank", "trainable"), [(m, t, r, n) for m, t, method, r, n in TABLE if method == "lora"]
)
def test_lora_plus_and_delta_lora_train_as_many_as_lora(
    model: str, targets: tuple[str, ...], name: str, rank: int, trainable: int
) -> None:
    assert count(model, targets, name, rank).trainable == trainable


def test_what_an_adapter_file_must_hold_is_counted_too() -> None:
    lora, lora_fa, delta = (count("llama-7b", SEVEN, name, 64) for name in ("lora", "lora_fa", "delta_lora"))
    assert lora.stored == lora_fa.stored == lora.trainable
    assert delta.stored == 2 * lora.stored
    vera = count("gpt2-medium", ("c_attn",), "vera", 256)
    assert vera.shared == 256 * (1024 + 3 * 1024)
    assert vera.stored == vera.trainable + vera.shared


@pytest.mark.parametrize(("model", "targets", "name", "rank", "trainable"), TABLE[:5])
def test_the_counts_are_those_of_the_tensors_that_are_built(
    model: str, targets: tuple[str, ...], name: str, rank: int, trainable: int
) -> None:
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(configuration(model))
    method = small_method(name, rank=rank, target_modules=targets)
    built = type(method).build_stacks([method], [0], adaptable_layers(base), base)
    assert sum(p.numel() for stack in built.values() for p in stack.parameters()) == trainable


def test_the_head_is_not_adapted() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(configuration("llama-3.2-3b"))
    method = small_method("lora", rank=1)
    assert len(method.target_layers(adaptable_layers(model, model.get_output_embeddings()))) == 7 * 28
    assert len(method.target_layers(adaptable_layers(model))) == 7 * 28 + 1


def test_a_pack_counts_as_its_members_do() -> None:
    base = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))
    for name in method_names():
        if not get_method(name).packable or not get_method(name).trained:
            continue
        method = small_method(name, rank=2)
        pack = AdapterPack(base, [(method, 0), (method, 1)])
        num_parameters = sum(parameter.numel() for parameter in pack.trainable_parameters())
        assert num_parameters == 2 * method.num_parameters(pack.layers).trainable
        pack.detach()
