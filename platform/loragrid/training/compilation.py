"""Compiles the decoder layers, the loss with its gradient, and the optimizer's update, to save time on a GPU."""

import torch
import torch.compiler.config
from transformers import PreTrainedModel

from loragrid.models.activation_checkpointing import decoder_layers
from loragrid.training.loss import fusible_score_rows
from loragrid.training.step import PackModel
from loragrid.training.torch_internals import allow_recomputation_of_saved_results, uncompile
from loragrid_methods.stacks.optimizer import adamw_update

RECOMPILE_LIMIT = 256
"""The most compilations of one function (one per adapter set and shape); beyond it torch silently runs eagerly."""


def fuse_pieces(model: PackModel) -> None:
    """Compile the two long sequences of elementwise kernels: softmax with its gradient, and AdamW. It takes seconds."""
    _allow_recompilations()
    model.score_rows = torch.compile(fusible_score_rows, dynamic=False)
    # Blocks of all sizes share one compilation.
    model.optimizer.update = torch.compile(adamw_update, dynamic=True)


def compile_layers(base: PreTrainedModel) -> None:
    """Compile every decoder layer separately, because layers of equal shapes share one compilation.

    Recomputing elementwise results in backward saves a third of the saved activations (LoRA, bytes per token and
    layer: 52,600 instead of 79,648) and costs about 1 % of the time.
    """
    _allow_recompilations()
    allow_recomputation_of_saved_results()
    for layer in decoder_layers(base):
        layer.compile(dynamic=False)


def uncompile_layers(base: PreTrainedModel) -> None:
    """Let every decoder layer run kernel by kernel again."""
    for layer in decoder_layers(base):
        uncompile(layer)


def _allow_recompilations() -> None:
    torch.compiler.config.recompile_limit = max(RECOMPILE_LIMIT, torch.compiler.config.recompile_limit)
