"""Tiny random models of many families, all with the same vocabulary, as transformers builds them from a config."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, PAD = 96, 0

SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
)
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOW = {"head_dim": 8, "sliding_window": 8}

FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "apertus": {},
        "arcee": {},
        "biogpt": {},
        "bloom": {},
        "codegen": {"rotary_dim": 4},
        "cohere": {"logit_scale": 0.0625},
        "cohere2": {"logit_scale": 0.25, "sliding_window": 8},
        "ernie4_5": {"head_dim": 8},
        "exaone4": {"sliding_window": 8},
        "falcon": {"num_kv_heads": 4, "new_decoder_architecture": False},
        "falcon_mamba": {"state_size": 8},
        "gemma": {"head_dim": 8},
        "gemma2": {**_WINDOW, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5},
        "gemma3_text": {**_WINDOW, "final_logit_softcapping": 2.0},
        "glm": {"head_dim": 8},
        "glm4": {"head_dim": 8},
        "gpt2": {},
        "gpt_bigcode": {},
        "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
        "gpt_neox": {},
        "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "sliding_window": 8},
        "gptj": {"rotary_dim": 4},
        "granite": {"logits_scaling": 8.0},
        "granitemoe": {"logits_scaling": 3.0, "num_local_experts": 4},
        "helium": {"head_dim": 8},
        "hunyuan_v1_dense": {"head_dim": 8},
        "lfm2": {},
        "llama": {},
        "mamba": {"state_size": 8},
        "mistral": {"sliding_window": 8},
        "mixtral": {"num_local_experts": 4},
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        "nemotron": {},
        "olmo": {},
        "olmo2": {},
        "olmoe": _EXPERTS,
        "openai-gpt": {},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "persimmon": {},
        "phi": {},
        "phi3": {},
        "qwen2": {},
        "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
        "qwen3": {"head_dim": 8},
        "qwen3_moe": {**_EXPERTS, "head_dim": 8},
        "recurrent_gemma": {"logits_soft_cap": 0.5, "attention_window_size": 8},
        "smollm3": {},
        "stablelm": {},
        "starcoder2": {},
        "vaultgemma": {**_WINDOW, "final_logit_softcapping": 1.5},
        "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    }
)
"""Model type -> what its config needs besides `SIZES`. The windows are shorter than the rows of the tests."""


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of a family, frozen and without a cache, as `load_base` returns it."""
    settings: dict[str, Any] = {**SIZES, **FAMILIES.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, **settings)
    loader: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base: PreTrainedModel = loader.from_config(config, dtype=dtype)
    base.requires_grad_(False).train(False)
    base.config.use_cache = False
    base.config.architectures = [type(base).__name__]
    return base
