"""Computes members' losses from hidden states: only logits of labelled positions, one chunk at a time."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loragrid.data.labels import IGNORED
from loragrid.models.logits import IDENTITY, LogitTransform, slope, transformed

CHUNK_ROWS = 2048
"""Rows of logits at a time: enough for an efficient product, few enough to keep float32 logits small."""


class ScoreRows(Protocol):
    """From a head's outputs to losses and their gradient.

    outputs (N, V), targets (N,) with -100 for rows without a label, weights (N,) with 0 for these rows -> (weighted
    cross-entropy of each row (N,) in float32 or better, the gradient of its sum with respect to the outputs (N, V) in
    their dtype). scale, cap: the model's `LogitTransform`, from outputs to logits, computed in float32 or better.
    """

    def __call__(
        self, outputs: Tensor, targets: Tensor, weights: Tensor, scale: float = 1.0, cap: float | None = None
    ) -> tuple[Tensor, Tensor]: ...


def score_rows(
    outputs: Tensor, targets: Tensor, weights: Tensor, scale: float = 1.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`ScoreRows` with torch's own kernels, in place where possible."""
    logits = _precise(outputs)
    if scale != 1.0 or cap is not None:
        logits = logits * (scale if cap is None else scale / cap)
        logits = logits if cap is None else logits.tanh_().mul_(cap)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    weights = weights.to(losses.dtype)
    scores = logits.softmax(-1)
    scores.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -torch.ones_like(scores[:, :1]))
    scores.mul_(weights.unsqueeze(1))
    if cap is not None:
        scores.mul_(logits.div_(cap).square_().neg_().add_(1.0))  # logits are not needed any more
    if scale != 1.0:
        scores.mul_(scale)
    return losses * weights, scores.to(outputs.dtype)


def fusible_score_rows(
    outputs: Tensor, targets: Tensor, weights: Tensor, scale: float = 1.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`ScoreRows` for a compiler: two passes over the outputs, and no float32 tensor of their size."""
    precise = transformed(_precise(outputs), scale, cap)
    weights = weights.to(precise.dtype)
    labels = targets.clamp(min=0).unsqueeze(1)
    largest = precise.amax(1, keepdim=True)
    total = (precise - largest).exp().sum(1, keepdim=True)
    losses = (total.log() + largest - precise.gather(1, labels)).squeeze(1)
    is_label = torch.arange(outputs.shape[1], device=outputs.device) == labels
    softmax = (precise - largest).exp() / total
    gradient = torch.where(is_label, softmax - 1.0, softmax) * weights.unsqueeze(1)
    if (scale, cap) != (1.0, None):
        gradient = gradient * slope(precise, scale, cap)
    return losses * weights, gradient.to(outputs.dtype)


def labelled_hidden_states(hidden: Tensor, label_positions: Tensor) -> Tensor:
    """hidden (R, L, d), label_positions (R, C) -> (R, C, d), the states whose next token is a label.

    It indexes instead of calling `gather`, because padding repeats positions. The backward of indexing adds these up in
    a fixed order: it needs no atomic operations, and need not sort all R * C * d values to be deterministic.
    """
    rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
    return hidden[rows, label_positions]


def member_losses(
    hidden: Tensor,
    targets: Tensor,
    num_labels: Tensor,
    head: nn.Linear,
    score: ScoreRows = score_rows,
    logits: LogitTransform = IDENTITY,
) -> Tensor:
    """Every member's summed cross-entropy over its labels, divided by its `num_labels`: (M,) float32 or better.

    hidden (M * R, C, d), targets (M * R, C) with -100 for no label, num_labels (M,). The caller passes the number of
    labels in the *whole* step; the workers' shares then add up to the mean. logits: what the model does to its head's
    outputs.
    """
    num_members = len(num_labels)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    weights = (1.0 / num_labels.clamp(min=1)).repeat_interleave(len(flat_targets) // num_members)
    weights = weights.masked_fill(flat_targets == IGNORED, 0.0)
    if head.weight.requires_grad:
        chunks = _chunks(flat, flat_targets, head)
        losses = torch.cat([_row_losses(outputs, rows, logits) for outputs, rows in chunks])
        return (losses * weights).view(num_members, -1).sum(1)
    summed: Tensor = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
        flat, flat_targets, weights, head, num_members, score, logits
    )
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
        transform: LogitTransform,
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        losses, start = [], 0
        for outputs, rows in _chunks(hidden, targets, head):
            chunk_weights = weights[start : start + len(rows)]
            if gradient is None:
                chunk_losses = _row_losses(outputs, rows, transform)
                losses.append(chunk_losses * chunk_weights.to(chunk_losses.dtype))
            else:
                chunk_losses, scores = _score(score, outputs, rows, chunk_weights, transform)
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
        return gradient * factors.to(gradient.dtype), None, None, None, None, None, None


def _chunks(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(targets), CHUNK_ROWS):
        yield F.linear(hidden[start : start + CHUNK_ROWS], head.weight, head.bias), targets[start : start + CHUNK_ROWS]


def _score(
    score: ScoreRows, outputs: Tensor, targets: Tensor, weights: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    if transform.is_identity:
        return score(outputs, targets, weights)
    return score(outputs, targets, weights, transform.scale, transform.cap)


def _row_losses(outputs: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    """Cross-entropy of each row in float32 or better, 0 for no label: a head's outputs (N, V), targets (N,) -> (N,)."""
    logits = transform.apply(_precise(outputs))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


def _precise(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
