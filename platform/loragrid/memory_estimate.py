"""What a pack will need on a GPU: its step is run on the meta device, where tensors have shapes and no data."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from loragrid.activation_checkpointing import checkpoint_activations
from loragrid.attention import allow_padding_without_mask, causal_attention
from loragrid.engine_choice import Mode
from loragrid.loss import score_rows
from loragrid.measurement import LiveBytes
from loragrid.sharding import gathered_bytes, share_bytes
from loragrid.step import Batch, PackModel, compute_step, one_worker
from loragrid_methods import Method
from loragrid_methods.engine.optimizer import MemberAdamW, adamw_update
from loragrid_methods.engine.pack import AdapterPack

ATTENTION = "loragrid_shapes"
# What a compiled step holds of what a captured one does: the compiler computes parts of the activations again.
COMPILED_KEEPS = 0.65
# torch's allocator hands out memory in blocks of this size.
BLOCK_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that torch has allocated at the peak of a pack's training step, by what holds them.

    adapters: weights and buffers. optimizer: gradients and moments. activations: what forward leaves for backward.
    passing: what else lives at the peak (logits, gradients on their way, what is gathered of a sharded base).
    """

    base: int
    adapters: int
    optimizer: int
    activations: int
    passing: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.base + self.adapters + self.optimizer + self.activations + self.passing


def estimate_memory(
    base: PreTrainedModel,
    methods: Sequence[Method],
    *,
    num_rows: int,
    length: int,
    mode: Mode = "eager",
    activation_checkpointing: bool = False,
    num_shares: int = 1,
) -> MemoryEstimate:
    """The peak of one step of a pack of `methods`, each member with `num_rows` rows of `length` tokens at once.

    Of several micro batches one lives at a time, and each adds its gradients into the same buffer: the peak is that of
    a step with as many rows as one of them has.
    With `num_shares` the base is sharded over as many workers, and this is one of them.

    `base` is a model on the meta device, which is given back as it was. Every token counts as a label. Evaluation holds
    less and is not counted; nor are CUDA's context and what the allocator cannot use of its blocks.

    Raises:
        NotImplementedError: the model looks at values, which tensors without data do not have.
    """
    assert base.device.type == "meta"
    attention = base.config._attn_implementation
    AttentionInterface.register(ATTENTION, _attention_of_shapes)
    allow_padding_without_mask(base)
    checkpoint_activations(base, activation_checkpointing)
    base.set_attn_implementation(ATTENTION)
    whole = num_shares == 1
    base_bytes = _bytes_of([*base.parameters(), *base.buffers()]) if whole else share_bytes(base, num_shares)
    gathered = 0 if whole else gathered_bytes(base)
    with torch.device("meta"):
        model = _model_of_shapes(base, methods, mode)
    try:
        with torch.device("meta"):
            rows = Batch(
                input_ids=torch.zeros(len(methods) * num_rows, length, dtype=torch.long),
                label_positions=torch.zeros(len(methods) * num_rows, length - 1, dtype=torch.long),
                label_targets=torch.zeros(len(methods) * num_rows, length - 1, dtype=torch.long),
                num_labels=torch.ones(len(methods), dtype=torch.float64),
            )
            with LiveBytes(block_bytes=BLOCK_BYTES) as live, warnings.catch_warnings():
                # Members share flat buffers, so a gradient is a view with the buffer's strides: correct.
                warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
                losses = model.losses(rows)
                activations = live.now
                del losses
                compute_step(model, rows, model.learning_rates[0], one_worker)
        stacks = [tensor for stack in model.pack.stacks() for tensor in (*stack.parameters(), *stack.buffers())]
        optimizer = [*model.optimizer.first_moments, *model.optimizer.second_moments, model.pack.gradient_buffer]
        kept = COMPILED_KEEPS if mode == "compiled" and not activation_checkpointing else 1.0
        return MemoryEstimate(
            base=base_bytes,
            adapters=_bytes_of(stacks),
            optimizer=_bytes_of(optimizer),
            activations=round(kept * activations),
            passing=live.peak - activations + gathered,
        )
    except RuntimeError as error:
        raise NotImplementedError(f"{type(base).__name__} has no step of shapes alone ({error})") from error
    finally:
        model.pack.detach()
        base.set_attn_implementation(attention)
        checkpoint_activations(base, False)


def _model_of_shapes(base: PreTrainedModel, methods: Sequence[Method], mode: Mode) -> PackModel:
    """The pack on the meta device; fused pieces, which allocate nothing but their results, by stand-ins that do so."""
    members = [(method, 0) for method in methods]
    dtype = torch.promote_types(base.dtype, torch.float32)
    pack = AdapterPack(base, members, output_layer=base.get_output_embeddings(), dtype=dtype)
    pack.train()
    vector = torch.ones(len(methods), dtype=torch.float64)
    optimizer = MemberAdamW(pack.blocks, weight_decay=vector, clip_norm=vector, beta1=0.9, beta2=0.999, epsilon=1e-8)
    optimizer.update = adamw_update if mode == "eager" else lambda *_, **__: None
    return PackModel(
        base=base,
        pack=pack,
        optimizer=optimizer,
        learning_rates=vector.unsqueeze(0),
        active=torch.ones(len(methods), dtype=torch.bool),
        score_rows=score_rows if mode == "eager" else _fused_scores_of_shapes,
    )


def _fused_scores_of_shapes(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(logits)


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    """The bytes of all storages behind the tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _attention_of_shapes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """The kernel that a GPU runs, by name: on the meta device torch would choose another, which keeps more."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return causal_attention(module, query, key, value, attention_mask, **settings)
    y = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=settings.get("scaling"))
    return y[0].transpose(1, 2).contiguous(), None
