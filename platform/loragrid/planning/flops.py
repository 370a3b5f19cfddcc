"""The floating-point operations that a base needs for a step, from shapes, and the most that the device can do."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import PreTrainedModel

from loragrid.models.activation_checkpointing import decoder_layers
from loragrid.training.meters import wait_for
from loragrid.training.trainable_set import base_trains
from loragrid_methods.stacks.pack import AdapterPack
from loragrid_methods.stacks.targets import adaptable_layers

# A product is as large as it must be to take this long, or as the largest: launching it does not count then.
PRODUCT_SECONDS = {"cuda": 2e-3, "cpu": 5e-3}
SMALLEST_SIDE, LARGEST_SIDE = 256, 8192
NUM_PRODUCTS = 10


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a base's shapes decides over its operations.

    num_layer_weights: of all matrices but the head. num_head_weights: vocabulary x width. attention_width: heads x
    their width, over all layers.
    """

    num_layer_weights: int
    num_head_weights: int
    attention_width: int

    @classmethod
    def of(cls, base: PreTrainedModel) -> "ModelShape | None":
        """The shape of a base to which nothing is attached; None of one without attention (Mamba, RWKV).

        Nor of one whose layers differ in their heads: what such models compute is not counted.
        """
        head, config = base.get_output_embeddings(), base.config.get_text_config()
        layers = adaptable_layers(base, head)
        if not isinstance(getattr(config, "num_attention_heads", None), int):
            return None
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            num_layer_weights=sum(layer.in_features * layer.out_features for layer in layers),
            num_head_weights=head.in_features * head.out_features,
            attention_width=len([*decoder_layers(base)]) * config.num_attention_heads * head_width,
        )


def passes_of(pack: AdapterPack) -> int:
    """How often a step multiplies with each weight of the base.

    1: forward alone (nothing trains). 2: also the gradient of what comes in. 3: also the weight's own gradient.
    """
    if base_trains(pack):
        return 3
    return 2 if pack.gradient_buffer.numel() else 1


def model_flops(shape: ModelShape, row_tokens: Sequence[int], num_labels: int, passes: int) -> float:
    """Floating-point operations that the base needs for rows of `row_tokens` tokens with `num_labels` labels in all.

    After Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B): 2 per weight, token and pass; of attention
    2 x 2 n per token of a row of n tokens, of which the causal half counts, and twice that for its backward. The head
    counts for labelled tokens, for it is computed at no others. Neither padding counts, nor computing activations
    again, nor norms and activation functions, nor what a method adds: a method that adds much does less of this per
    second. As in the formula, the layers below the lowest adapted one count like all others.
    """
    num_tokens = sum(row_tokens)
    weights = 2.0 * passes * (shape.num_layer_weights * num_tokens + shape.num_head_weights * num_labels)
    attention = 2.0 * shape.attention_width * sum(tokens * tokens for tokens in row_tokens)
    return weights + attention * (1 if passes == 1 else 3)


@dataclass(frozen=True, kw_only=True)
class DeviceLimit:
    """The fastest matrix product of a device in one type, operations per second, and what finding that took."""

    flops_per_second: float
    seconds: float


def device_limit(device: torch.device, dtype: torch.dtype) -> DeviceLimit:
    """Measured once per process, device, type and number of threads."""
    return _measure_limit(device, dtype, torch.get_num_threads())


@cache
def _measure_limit(device: torch.device, dtype: torch.dtype, num_threads: int) -> DeviceLimit:
    return measure_limit(device, dtype)


@torch.no_grad()
def measure_limit(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> DeviceLimit:
    """2 n^3 operations over the shortest of some products of n x n matrices, n doubled until one takes its time."""
    began = clock()
    generator = torch.Generator(device).manual_seed(0)  # of its own: training draws what it would have
    side = SMALLEST_SIDE
    while True:
        # Of equal numbers some devices make more per second.
        left, right = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
        shortest = float("inf")
        for attempt in range(NUM_PRODUCTS + 1):
            wait_for(device)
            start = clock()
            torch.mm(left, right)
            wait_for(device)
            # The first makes the library's own workspaces.
            shortest = min(shortest, clock() - start) if attempt else shortest
        if shortest >= PRODUCT_SECONDS[device.type] or 2 * side > LARGEST_SIDE:
            return DeviceLimit(flops_per_second=2.0 * side**3 / shortest, seconds=clock() - began)
        side *= 2
