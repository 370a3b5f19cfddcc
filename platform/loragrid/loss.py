"""The members' losses from hidden states: logits of labelled positions only, in chunks, never all at once."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of logits at a time: enough to keep the product efficient, few enough to keep float32 logits small.
CHUNK_ROWS = 2048
IGNORED = -100


def labelled_hidden_states(hidden: Tensor, label_positions: Tensor) -> Tensor:
    """hidden (R, L, d), label_positions (R, C) -> (R, C, d), the states whose next token is a label."""
    return hidden.gather(1, label_positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def member_losses(hidden: Tensor, targets: Tensor, num_labels: Tensor, head: nn.Linear) -> Tensor:
    """Every member's summed cross-entropy over its labels, divided by its `num_labels`: (M,) float32 or better.

    hidden (M * R, C, d), targets (M * R, C) with -100 where there is no label, num_labels (M,). The caller gives the
    number of labels in the *whole* step, so that workers' shares add up to the mean.
    """
    num_members = len(num_labels)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    weights = (1.0 / num_labels.clamp(min=1)).repeat_interleave(len(flat_targets) // num_members)
    weights = weights.masked_fill(flat_targets == IGNORED, 0.0)
    if head.weight.requires_grad:
        losses = torch.cat([_row_losses(logits, rows) for logits, rows in _chunks(flat, flat_targets, head)])
        return (losses * weights).view(num_members, -1).sum(1)
    summed: Tensor = _FrozenHeadLoss.apply(flat, flat_targets, weights, head, num_members)  # type: ignore[no-untyped-call]
    return summed


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a frozen head, with the gradient to the hidden states computed in the forward pass.

    Only that gradient (N, d) is kept for backward; logits (N, V) never exist beyond one chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weights: Tensor, head: nn.Linear, num_members: int
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        losses, start = [], 0
        for logits, rows in _chunks(hidden, targets, head):
            chunk_losses = _row_losses(logits, rows)
            chunk_weights = weights[start : start + len(rows)].to(chunk_losses.dtype)
            losses.append(chunk_losses * chunk_weights)
            if gradient is not None:
                scores = logits.to(chunk_losses.dtype).softmax(-1)
                scores.scatter_add_(1, rows.clamp(min=0).unsqueeze(1), -torch.ones_like(scores[:, :1]))
                scores.mul_(chunk_weights.unsqueeze(1))
                gradient[start : start + len(rows)] = scores.to(head.weight.dtype) @ head.weight
            start += len(rows)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(losses).view(num_members, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g (M,) -> gradient of the hidden states (N, d)."""
        (gradient,) = ctx.saved_tensors
        rows_per_member = len(gradient) // len(g)
        factors = g.repeat_interleave(rows_per_member).unsqueeze(1)
        return gradient * factors.to(gradient.dtype), None, None, None, None


def _chunks(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(targets), CHUNK_ROWS):
        yield F.linear(hidden[start : start + CHUNK_ROWS], head.weight, head.bias), targets[start : start + CHUNK_ROWS]


def _row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row in float32 or better, 0 without a label: logits (N, V), targets (N,) -> (N,)."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise, targets, ignore_index=IGNORED, reduction="none")
