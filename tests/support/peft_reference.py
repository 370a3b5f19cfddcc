"""Shared by the comparisons with PEFT: its losses on our batches, its optimizer, and the test for equality."""

from typing import Any

import torch
from torch import Tensor

from tests.support.pack_training import LINEAR_LAYERS, PackRun, TinyModel, next_token_losses, token_ids

GPT2_LAYERS = ("c_attn", "c_fc", "c_proj")


def targets_of(base: Any) -> tuple[str, ...]:
    return LINEAR_LAYERS if isinstance(base, TinyModel) else GPT2_LAYERS


def peft_losses(model: Any, base: Any, step: int) -> Tensor:
    ids = token_ids(base, 0, step)
    return next_token_losses(model(input_ids=ids).logits, ids, 1)


def randomise(run: PackRun, parameter: str) -> None:
    """Fill a parameter that starts at zero with random values; otherwise other gradients would be zero."""
    generator = torch.Generator().manual_seed(0)
    for stack in run.pack.stacks():
        held = stack.get_parameter(parameter).data
        held.copy_(0.3 * torch.randn(held.shape, generator=generator, dtype=held.dtype))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    assert ours.shape == theirs.shape
    assert theirs.abs().max().item() > 0
    assert (ours - theirs).abs().max().item() <= tolerance * theirs.abs().max().item()


def held_by_layer(run: PackRun) -> dict[str, dict[str, Tensor]]:
    """Layer -> tensor name -> a copy of the first member's tensor."""
    stacks, index = run.pack.member_stacks(0)
    return {
        layer: {name: tensor.clone() for name, tensor in stack.member_tensors(index).items()}
        for layer, stack in stacks.items()
    }


def adamw_of(model: Any, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's AdamW over the trainable parameters of PEFT's model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
