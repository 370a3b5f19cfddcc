"""What a pack holds in memory, part by part: every storage is in one part, and no part is an estimate."""

from collections.abc import Iterable

import torch
from torch import Tensor

from loragrid.models.sharding import whole_head
from loragrid.training.meters import LiveBytes, bytes_of, wait_for
from loragrid.training.step import Batch, PackModel


def resident_parts(model: PackModel) -> dict[str, float]:
    """Metric key -> bytes of what lives from the first step to the last, on this worker.

    base: the base's weights (this worker's share of a sharded one) and its buffers.
    adapter: the stacks' own tensors, trained or not: LoRA-FA's A, VeRA's projections (once), Delta-LoRA's reference
    pair, a projected method's projections; of full fine-tuning the float32 master copy of a base in bfloat16, and
    nothing where the base itself is what trains.
    gradient: the buffer of all gradients, which lives between steps too.
    optimizer: AdamW's two moments and, a few bytes for each member, what else its update reads: step count, decay,
    clipping norm, multipliers, learning rates, stop mark.
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
        # Full fine-tuning's weights are the base's own storage: it has been counted.
        before = bytes_of(seen)
        seen += tensors
        figures[key] = float(bytes_of(seen) - before)
    return figures


def loss_bytes(model: PackModel, batch: Batch) -> int:
    """The most that the loss of `batch` holds, forward and backward, beyond the hidden states and what it saves.

    That is the logits of one chunk with what is computed from them, and the gradients on their way. Counted on the
    loss by itself: by the allocator on a GPU, elsewhere from the storages it makes, to the byte. What is gathered of a
    sharded head is not part of it. Full fine-tuning saves its logits: they are saved activations.
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
    """Gradients that go nowhere: those of the training stay as they are."""
    if losses.requires_grad:
        torch.autograd.grad(losses.sum(), list(trained))
