"""Computes members' losses from hidden states: only logits of labelled positions, one chunk at a time."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loragrid.data.labels import IGNORED

CHUNK_ROWS = 2048
"""Rows of logits at a time: enough for an efficient product, few enough to keep float32 logits small."""


class ScoreRows(Protocol):
    """From logits to losses and their gradient.

    logits (N, V), targets (N,) with -100 for rows without a label, weights (N,) with 0 for these rows -> (weighted
    cross-entropy of each row (N,) in float32 or better, the gradient of its sum with respect to the logits (N, V) in
    their dtype).
    """

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]: ...


def score_rows(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`ScoreRows` with torch's own kernels, in place where possible."""
    losses = _row_losses(logits, targets)
    weights = weights.to(losses.dtype)
    scores = logits.to(losses.dtype).softmax(-1)
    scores.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -torch.ones_like(scores[:, :1]))
    scores.mul_(weights.unsqueeze(1))
    return losses * weights, scores.to(logits.dtype)


def fusible_score_rows(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`ScoreRows` for a compiler: two passes over the logits, and no float32 tensor of their size."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = weights.to(precise.dtype)
    labels = targets.clamp(min=0).unsqueeze(1)
    largest = precise.amax(1, keepdim=True)
    total = (precise - largest).exp().sum(1, keepdim=True)
    losses = (total.log() + largest - precise.gather(1, labels)).squeeze(1)
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels
    softmax = (precise - largest).exp() / total
    gradient = torch.where(is_label, softmax - 1.0, softmax) * weights.unsqueeze(1)
    return losses * weights, gradient.to(logits.dtype)


def labelled_hidden_states(hidden: Tensor, label_positions: Tensor) -> Tensor:
    """hidden (R, L, d), label_positions (R, C) -> (R, C, d), the states whose next token is a label.

    It indexes instead of calling `gather`, because padding repeats positions. The backward of indexing adds these up in
    a fixed order: it needs no atomic operations, and need not sort all R * C * d values to be deterministic.
    """
    rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
    return hidden[rows, label_positions]


def member_losses(
    hidden: Tensor, targets: Tensor, num_labels: Tensor, head: nn.Linear, score: ScoreRows = score_rows
) -> Tensor:
    """Every member's summed cross-entropy over its labels, divided by its `num_labels`: (M,) float32 or better.

    hidden (M * R, C, d), targets (M * R, C) with -100 for no label, num_labels (M,). The caller passes the number of
    labels in the *whole* step; the workers' shares then add up to the mean.
    """
    num_members = len(num_labels)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    weights = (1.0 / num_labels.clamp(min=1)).repeat_interleave(len(flat_targets) // num_members)
    weights = weights.masked_fill(flat_targets == IGNORED, 0.0)
    if head.weight.requires_grad:
        losses = torch.cat([_row_losses(logits, rows) for logits, rows in _chunks(flat, flat_targets, head)])
        return (losses * weights).view(num_members, -1).sum(1)
    summed: Tensor = _FrozenHeadLoss.apply(flat, flat_targets, weights, head, num_members, score)  # type: ignore[no-untyped-call]
    return summed


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a frozen head; the gradient of the hidden states is computed in the forward pass.

    Only that gradient (N, d) is kept for backward; logits exist for one chunk at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        head: nn.Linear,
        num_members: int,
        score: ScoreRows,
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        losses, start = [], 0
        for logits, rows in _chunks(hidden, targets, head):
            chunk_weights = weights[start : start + len(rows)]
            if gradient is None:
                chunk_losses = _row_losses(logits, rows)
                losses.append(chunk_losses * chunk_weights.to(chunk_losses.dtype))
            else:
                chunk_losses, scores = score(logits, rows, chunk_weights)
                losses.append(chunk_losses)
                gradient[start : start + len(rows)] = scores @ head.weight
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
        return gradient * factors.to(gradient.dtype), None, None, None, None, None


def _chunks(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(targets), CHUNK_ROWS):
        yield F.linear(hidden[start : start + CHUNK_ROWS], head.weight, head.bias), targets[start : start + CHUNK_ROWS]


def _row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row in float32 or better, 0 for no label: logits (N, V), targets (N,) -> (N,)."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise, targets, ignore_index=IGNORED, reduction="none")
