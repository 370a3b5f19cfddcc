"""Models of real shapes with random weights, and random rows: the cost of a step does not depend on values."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from loragrid.training.step import Batch

SEVEN_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**{"tie_word_embeddings": True, "max_position_embeddings": 4096, "use_cache": False} | fields)


def shape_config(name: str) -> PretrainedConfig:
    """The configuration of one of the benchmarked models.

    Raises:
        ValueError: an unknown name.
    """
    configs: dict[str, Callable[[], PretrainedConfig]] = {
        "llama-3.2-1b": lambda: _llama(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64,
        ),
        "llama-3.1-8b": lambda: _llama(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, tie_word_embeddings=False,
        ),
        "qwen3-0.6b": lambda: Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, use_cache=False,
        ),
        "smollm2-135m": lambda: _llama(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3,
        ),
        "tiny": lambda: _llama(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        ),
    }  # fmt: skip
    if name not in configs:
        raise ValueError(f"unknown shapes {name!r}; allowed: {', '.join(configs)}")
    return configs[name]()


def random_base(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of these shapes with the same weights at every call, frozen and in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        loader: Any = AutoModelForCausalLM
        base: PreTrainedModel = loader.from_config(shape_config(name), dtype=torch.bfloat16)
    base.to(dtype)  # type: ignore[arg-type]  # transformers narrows torch's own signature
    base.requires_grad_(False).train(False)
    return base


def shapes_only(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of these shapes on the meta device: no weights."""
    with torch.device("meta"):
        loader: Any = AutoModelForCausalLM
        base: PreTrainedModel = loader.from_config(shape_config(name), dtype=dtype)
    base.requires_grad_(False).train(False)
    return base


def random_rows(
    vocabulary: int, num_members: int, num_rows: int, length: int, device: torch.device, seed: int
) -> Batch:
    """`num_rows` rows of `length` tokens for each member; all members see the same rows, like trials of one seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (num_rows, length), generator=generator).repeat(num_members, 1).to(device)
    positions = torch.arange(length - 1, device=device).expand(len(ids), -1).contiguous()
    labels = torch.full((num_members,), float(num_rows * (length - 1)), dtype=torch.float64, device=device)
    return Batch(input_ids=ids, label_positions=positions, label_targets=ids[:, 1:].contiguous(), num_labels=labels)
