"""Builds a small copy of a model from its config: one layer of each kind, random weights, the real code."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from loragrid.models.quiet import quiet_transformers

MAX_NUMBERS = 10**9
"""The largest copy, in numbers of its weights: 4 GiB in float32, a few seconds to draw."""
MIN_LAYERS, VOCABULARY = 2, 512
FILL_STD = 0.02


def few_layers(config: PretrainedConfig, name: str) -> PreTrainedModel | None:
    """A float32 copy with `MIN_LAYERS` layers, more if the config has more kinds; None if none can be built.

    It has the widths and the code of the model, and a small vocabulary if the model's code allows one.
    """
    for vocabulary in (VOCABULARY, None):
        small = _shortened(config, vocabulary)
        try:
            if _num_numbers(small) > MAX_NUMBERS:
                continue
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return _ready(_from_config(small), name)
        except Exception:  # whatever a shortened config can break in a model's code: the workers check the whole base
            continue
    return None


def _from_config(config: PretrainedConfig) -> PreTrainedModel:
    loader: Any = AutoModelForCausalLM
    base: PreTrainedModel = loader.from_config(config, dtype=torch.float32)
    return base


def _num_numbers(config: PretrainedConfig) -> int:
    with quiet_transformers(), torch.device("meta"):
        return sum(weight.numel() for weight in _from_config(config).parameters())


def _ready(base: PreTrainedModel, name: str) -> PreTrainedModel:
    base.requires_grad_(False).train(False)
    base.config.use_cache = False
    base.name_or_path = base.config.name_or_path = name
    for weight in base.parameters():
        if weight.dim() > 1 and not weight.any():  # a block that starts as nothing would hide what it reads
            weight.normal_(std=FILL_STD)
    return base


def _shortened(config: PretrainedConfig, vocabulary: int | None) -> PretrainedConfig:
    """The config with few layers; lists with an entry per layer keep the entries of these layers."""
    small = copy.deepcopy(config)
    for part in {id(part): part for part in (small, small.get_text_config())}.values():
        num_layers = getattr(part, "num_hidden_layers", None)
        if isinstance(num_layers, int) and num_layers > MIN_LAYERS:
            kept = _kept_layers(part, num_layers)
            for key, value in list(vars(part).items()):
                if isinstance(value, list | tuple) and len(value) == num_layers:
                    setattr(part, key, type(value)(value[layer] for layer in kept))
            part.num_hidden_layers = len(kept)
        if vocabulary is not None and (vocab_size := getattr(part, "vocab_size", None)) and vocab_size > vocabulary:
            part.vocab_size = vocabulary
            for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
                if isinstance(value := getattr(part, key, None), int) and value >= vocabulary:
                    setattr(part, key, value % vocabulary)
    return small


def _kept_layers(config: PretrainedConfig, num_layers: int) -> list[int]:
    """The first layer of each kind, and at least the first `MIN_LAYERS`, in order."""
    kinds = getattr(config, "layer_types", None)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        kinds = [None] * num_layers
    kept = {kinds.index(kind) for kind in kinds} | set(range(MIN_LAYERS))
    return sorted(kept)
