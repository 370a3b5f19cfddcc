"""Activation checkpointing: a decoder layer keeps its input alone and computes the rest again in backward.

Chen et al. 2016 (arXiv 1604.06174), by torch.utils.checkpoint.
"""

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_activations(base: PreTrainedModel, enabled: bool) -> None:
    """Let every decoder layer of the base keep its input alone, or all that backward needs.

    Not by transformers' own switch, which works in training mode only: a frozen base is always in evaluation mode.
    Random draws are not replayed: dropout's masks follow from seed, layer and step, and are the same when drawn again.
    """
    for layer in decoder_layers(base):
        vars(layer).pop("forward", None)
        if enabled:
            forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            vars(layer)["forward"] = forward


def decoder_layers(base: PreTrainedModel) -> Iterator[nn.Module]:
    """The layers that transformers derives from one class in every model."""
    for module in base.base_model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield module
