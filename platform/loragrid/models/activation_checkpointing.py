"""Activation checkpointing: a decoder layer keeps only its input and computes the rest again in backward.

Chen et al. 2016 (arXiv 1604.06174), implemented with torch.utils.checkpoint.
"""

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_activations(base: PreTrainedModel, enabled: bool) -> None:
    """Let every decoder layer of the base keep only its input, or (not `enabled`) everything that backward needs.

    transformers' own switch only works in training mode, and a frozen base is always in evaluation mode. The random
    state is not preserved: dropout masks follow from seed, layer and step, so they are the same in both passes.
    """
    for layer in decoder_layers(base):
        vars(layer).pop("forward", None)
        if enabled:
            forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            vars(layer)["forward"] = forward


def decoder_layers(base: PreTrainedModel) -> Iterator[nn.Module]:
    """The base's decoder layers, which transformers derives from one class in every model."""
    for module in base.base_model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield module
