"""Counts a base's floating-point operations per step from its shapes, and measures the device's fastest rate."""

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

# Matrices grow until a product takes this long or reaches the largest side; its launch time is negligible then.
PRODUCT_SECONDS = {"cuda": 2e-3, "cpu": 5e-3}
SMALLEST_SIDE, LARGEST_SIDE = 256, 8192
NUM_PRODUCTS = 10


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a base that determine its floating-point operations.

    num_layer_weights: weights of all matrices except the head. num_head_weights: vocabulary x hidden size.
    attention_width: heads x head width, summed over all layers.
    """

    num_layer_weights: int
    num_head_weights: int
    attention_width: int

    @classmethod
    def of(cls, base: PreTrainedModel) -> "ModelShape | None":
        """The shape of a base without adapters; None if its operations cannot be counted.

        They cannot if the base has no attention (Mamba, RWKV), or if its layers differ in their heads.
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
    """The number of products with each weight of the base in one step.

    1: forward only (nothing trains). 2: also the gradient of the layer's input. 3: also the gradient of the weight.
    """
    if base_trains(pack):
        return 3
    return 2 if pack.gradient_buffer.numel() else 1


def model_flops(shape: ModelShape, row_tokens: Sequence[int], num_labels: int, passes: int) -> float:
    """Floating-point operations that the base needs for rows of `row_tokens` tokens with `num_labels` labels in all.

    After Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B): 2 per weight, token and pass. Attention adds
    2 x 2 n per token and unit of `attention_width` in a row of n tokens, of which the causal half counts; its backward
    counts twice as much. The head counts for labelled tokens only, because it is computed only there. Layers below the
    lowest adapted one count like all others, as in the formula.

    Not counted: padding, recomputed activations, norms, activation functions, and the operations that a method adds.
    A method that adds many therefore reaches a lower rate.
    """
    num_tokens = sum(row_tokens)
    weights = 2.0 * passes * (shape.num_layer_weights * num_tokens + shape.num_head_weights * num_labels)
    attention = 2.0 * shape.attention_width * sum(tokens * tokens for tokens in row_tokens)
    return weights + attention * (1 if passes == 1 else 3)


@dataclass(frozen=True, kw_only=True)
class DeviceLimit:
    """The rate of a device's fastest matrix product in one data type, and the seconds that measuring it took."""

    flops_per_second: float
    seconds: float


def device_limit(device: torch.device, dtype: torch.dtype) -> DeviceLimit:
    """The limit of a device, measured once per process, device, data type and number of threads."""
    return _measure_limit(device, dtype, torch.get_num_threads())


@cache
def _measure_limit(device: torch.device, dtype: torch.dtype, num_threads: int) -> DeviceLimit:
    return measure_limit(device, dtype)


@torch.no_grad()
def measure_limit(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> DeviceLimit:
    """Measure the rate of products of n x n matrices: 2 n^3 operations divided by the shortest time of several.

    n doubles until a product takes `PRODUCT_SECONDS` or n reaches `LARGEST_SIDE`.
    """
    began = clock()
    generator = torch.Generator(device).manual_seed(0)  # leaves the draws of training unchanged
    side = SMALLEST_SIDE
    while True:
        # Random entries, because some devices multiply matrices of equal entries faster.
        left, right = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
        shortest = float("inf")
        for attempt in range(NUM_PRODUCTS + 1):
            wait_for(device)
            start = clock()
            torch.mm(left, right)
            wait_for(device)
            # The first product does not count, because the library allocates its workspaces in it.
            shortest = min(shortest, clock() - start) if attempt else shortest
        if shortest >= PRODUCT_SECONDS[device.type] or 2 * side > LARGEST_SIDE:
            return DeviceLimit(flops_per_second=2.0 * side**3 / shortest, seconds=clock() - began)
        side *= 2
