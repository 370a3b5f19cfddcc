"""Measures a pack's memory part by part: every storage is counted in exactly one part, and nothing is estimated."""

from collections.abc import Iterable

import torch
from torch import Tensor

from loragrid.models.sharding import whole_head
from loragrid.training.meters import LiveBytes, bytes_of, wait_for
from loragrid.training.step import Batch, PackModel


def resident_parts(model: PackModel) -> dict[str, float]:
    """Metric key -> bytes that this worker holds from the first step to the last.

    base: the base's weights (this worker's share of a sharded one) and its buffers.
    adapter: the stacks' own tensors, trained or not, such as LoRA-FA's A, VeRA's projections (once), Delta-LoRA's
    reference pair, a projected method's projections. For full fine-tuning, it is the float32 master copy of a bfloat16
    base, and nothing if the base's own weights are trained.
    gradient: the buffer of all gradients, which also lives between steps.
    optimizer: AdamW's two moments, and a few bytes per member that its update reads: step count, decay, clipping norm,
    multipliers, learning rates, stop mark.
    """
    pack, optimizer = model.pack, model.optimizer
    stacks = [tensor for stack in pack.stacks() for tensor in (*stack.parameters(), *stack.buffers())]
    in_stacks = {id(tensor) for tensor in stacks}
    base = [tensor for tensor in (*model.base.parameters(), *model.base.buffers()) if id(tensor) not in in_stacks]
    settings = [optimizer.weight_decay, optimizer.clip_norm, model.learning_rates, model.active]
    parts = {
        "memory/base_bytes": base,
        "memory/adapter_bytes": stacks,
        "memory/gradient_bytes": [pack.gradient_buffer],
        "memory/optimizer_bytes": [
            *optimizer.state_tensors().values(),
            *(block.multiplier for block in optimizer.blocks),
            *settings,
        ],
    }
    figures, seen = {}, list[Tensor]()
    for key, tensors in parts.items():
        # Full fine-tuning trains the base's own storage, which is already counted.
        before = bytes_of(seen)
        seen += tensors
        figures[key] = float(bytes_of(seen) - before)
    return figures


def loss_bytes(model: PackModel, batch: Batch) -> int:
    """The peak bytes of the loss of `batch`, forward and backward, without the hidden states and saved activations.

    These bytes are the logits of one chunk, tensors computed from them, and intermediate gradients. Only the loss is
    run: on a GPU the allocator reports its peak; elsewhere its storages are counted to the byte. Gathered parts of a
    sharded head are not included. Full fine-tuning saves its logits, so they count as saved activations.
    """
    with torch.no_grad():
        hidden = model.base.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    hidden.requires_grad_(model.pack.gradient_buffer.numel() > 0)
    with whole_head(model.base) as head:
        trained = [tensor for tensor in (hidden, *head.parameters()) if tensor.requires_grad]
        if hidden.device.type != "cuda":
            with LiveBytes() as live:
                losses = model.score(hidden, batch, head)
                kept = live.now - bytes_of([losses])
                _backward(losses, trained)
            return int(live.peak - kept)
        wait_for(hidden.device)
        torch.cuda.reset_peak_memory_stats(hidden.device)
        before = torch.cuda.memory_allocated(hidden.device)
        losses = model.score(hidden, batch, head)
        kept = torch.cuda.memory_allocated(hidden.device) - before - bytes_of([losses])
        _backward(losses, trained)
        return int(torch.cuda.max_memory_allocated(hidden.device) - before - kept)


def _backward(losses: Tensor, trained: Iterable[Tensor]) -> None:
    """Compute gradients and discard them; the gradients of the training stay unchanged."""
    if losses.requires_grad:
        torch.autograd.grad(losses.sum(), list(trained))
