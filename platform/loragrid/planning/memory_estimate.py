"""Estimates a pack's GPU memory: trains and scores it on the meta device, where tensors have shapes but no data."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from loragrid.evaluation.generation import Decoding, next_tokens
from loragrid.models.activation_checkpointing import checkpoint_activations
from loragrid.models.attention import allow_padding_without_mask, plain_causal_attention
from loragrid.models.sharding import gathered_bytes, share_bytes
from loragrid.models.versions import version_of
from loragrid.training.loss import score_rows
from loragrid.training.meters import LiveBytes
from loragrid.training.step import Batch, PackModel, compute_step, one_worker
from loragrid.training.step_mode import Mode
from loragrid.training.torch_internals import storage_id
from loragrid_methods import Method
from loragrid_methods.stacks.optimizer import MemberAdamW, adamw_update
from loragrid_methods.stacks.pack import AdapterPack

if TYPE_CHECKING:
    from loragrid.tasks.contract import TaskConfig

ATTENTION, MASKED_ATTENTION = "loragrid_shapes", "loragrid_masked_shapes"
# The share of a captured step's activations that a compiled step holds, because the compiler recomputes some of them.
COMPILED_KEEPS = 0.65
# torch's allocator hands out memory in blocks of this size.
BLOCK_BYTES = 512
# Older versions of transformers repeat keys and values even for the single query of a generated token.
SINGLE_QUERIES_ARE_GROUPED = version_of("transformers") >= (5, 23)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that torch has allocated at the peak of a pack's training and scoring, by purpose.

    Allocated all the time: base (of a sharded one, this worker's share); adapters (weights and buffers); optimizer
    (gradients and moments). Allocated in addition, one stage after another: in a training step, activations (what
    forward leaves for backward) and passing (logits, intermediate gradients and gathered parts of a sharded base at the
    step's peak); evaluation (a forward pass of evaluation rows with their losses); generation (answering prompts, with
    the key-value cache; 0 if nothing is generated).
    prompts_at_once: the number of each member's prompts that are answered at once; 0 if none are.
    """

    base: int
    adapters: int
    optimizer: int
    activations: int
    passing: int
    evaluation: int
    generation: int
    prompts_at_once: int = 0

    @property
    def total(self) -> int:
        """The bytes at the peak: the constant parts and the largest stage."""
        step = self.activations + self.passing
        return self.base + self.adapters + self.optimizer + max(step, self.evaluation, self.generation)


@dataclass(frozen=True, kw_only=True)
class ScoringShape:
    """The shape of the largest batch that is scored at once, with as many rows per member as train at once.

    length: tokens of a row whose loss is computed. prompt, max_new_tokens: tokens of the longest prompt and of the
    longest generated answer (0: no answers). sampled: tokens are drawn; otherwise the likeliest is taken.
    num_prompts: the most prompts that a worker has to answer. As many of them are answered at once as fit into the
    memory that training needs.
    """

    length: int
    prompt: int = 0
    max_new_tokens: int = 0
    sampled: bool = False
    num_prompts: int = 0

    @classmethod
    def of(cls, task: "TaskConfig | None", *, length: int, prompt: int, num_prompts: int) -> "ScoringShape":
        """The shape for a task whose longest prompt has `prompt` tokens."""
        generation = None if task is None else task.generation
        if generation is None:
            return cls(length=length)
        return cls(
            length=length,
            prompt=prompt,
            max_new_tokens=generation.max_new_tokens,
            sampled=generation.temperature is not None,
            num_prompts=num_prompts,
        )


def estimate_memory(
    base: PreTrainedModel,
    methods: Sequence[Method],
    *,
    num_rows: int,
    length: int,
    mode: Mode = "eager",
    activation_checkpointing: bool = False,
    num_shares: int = 1,
    scoring: ScoringShape | None = None,
) -> MemoryEstimate:
    """The memory peak of a pack of `methods`, each member with `num_rows` rows of `length` tokens at once.

    Micro batches run one after another and add their gradients into the same buffer, so only the rows of one count.
    base: a model on the meta device; it is unchanged afterwards. num_shares: the number of workers over which the base
    is sharded; the estimate is for one of them. scoring: None: rows of the training's shape are scored, and nothing is
    generated.

    Every token counts as a label. Not counted: CUDA's context; memory in the allocator's blocks that it cannot use; and
    the memory that a captured step keeps during scoring, because scoring then uses fewer rows at once.

    Raises:
        NotImplementedError: the model reads values, which tensors on the meta device do not have.
    """
    assert base.device.type == "meta"
    scoring = scoring or ScoringShape(length=length)
    attention = base.config._attn_implementation
    AttentionInterface.register(ATTENTION, _attention_of_shapes)
    AttentionInterface.register(MASKED_ATTENTION, _masked_attention_of_shapes)
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
            activations, passing = _step(model, _rows_of_shapes(len(methods), num_rows, length))
            evaluation = _evaluation(model, _rows_of_shapes(len(methods), num_rows, scoring.length))
            base.set_attn_implementation(MASKED_ATTENTION)
            kept = COMPILED_KEEPS if mode == "compiled" and not activation_checkpointing else 1.0
            activations = round(kept * activations)
            limit = max(activations + passing, evaluation)
            prompts, generation = _most_prompts(model, num_rows, scoring, limit) if scoring.max_new_tokens else (0, 0)
        stacks = [tensor for stack in model.pack.stacks() for tensor in (*stack.parameters(), *stack.buffers())]
        optimizer = [*model.optimizer.first_moments, *model.optimizer.second_moments, model.pack.gradient_buffer]
        return MemoryEstimate(
            base=base_bytes,
            adapters=_bytes_of(stacks),
            optimizer=_bytes_of(optimizer),
            activations=activations,
            passing=passing + gathered,
            evaluation=evaluation + gathered,
            generation=generation + gathered if generation else 0,
            prompts_at_once=prompts,
        )
    except RuntimeError as error:
        model_name = type(base).__name__
        raise NotImplementedError(f"{model_name}: a step cannot run on tensors without data ({error})") from error
    finally:
        model.pack.detach()
        base.set_attn_implementation(attention)
        checkpoint_activations(base, False)


def _rows_of_shapes(num_members: int, num_rows: int, length: int) -> Batch:
    return Batch(
        input_ids=torch.zeros(num_members * num_rows, length, dtype=torch.long),
        label_positions=torch.zeros(num_members * num_rows, length - 1, dtype=torch.long),
        label_targets=torch.zeros(num_members * num_rows, length - 1, dtype=torch.long),
        num_labels=torch.ones(num_members, dtype=torch.float64),
    )


def _step(model: PackModel, rows: Batch) -> tuple[int, int]:
    """(Bytes that a step's forward leaves for backward, other bytes at the step's peak)."""
    with LiveBytes(block_bytes=BLOCK_BYTES) as live, warnings.catch_warnings():
        # The warning is harmless: members share flat buffers, so a gradient has the buffer's strides.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        losses = model.losses(rows)
        activations = live.now
        del losses
        compute_step(model, rows, model.learning_rates[0], one_worker)
    return activations, live.peak - activations


def _evaluation(model: PackModel, rows: Batch) -> int:
    """The peak of one evaluation batch, in bytes."""
    with model.evaluating(), torch.no_grad(), LiveBytes(block_bytes=BLOCK_BYTES) as live:
        model.losses(rows)
    return int(live.peak)


def _most_prompts(model: PackModel, num_rows: int, scoring: ScoringShape, limit: int) -> tuple[int, int]:
    """(Number of each member's prompts that can be answered at once within `limit` bytes, peak bytes of doing so).

    Generating a token for many prompts takes hardly longer than for few. The number starts at `num_rows` and doubles
    while it fits; it can be halved as often if memory runs out.
    """
    prompts, peak = num_rows, _generation(model, num_rows, scoring)
    while prompts < scoring.num_prompts and (more := _generation(model, 2 * prompts, scoring)) <= limit:
        prompts, peak = 2 * prompts, more
    return prompts, peak


@torch.no_grad()
def _generation(model: PackModel, num_rows: int, scoring: ScoringShape) -> int:
    """The peak bytes of answering prompts: while they are read, or at the last token, when the cache is fullest."""
    num_all = model.pack.num_members * num_rows
    decoding = Decoding(
        max_new_tokens=scoring.max_new_tokens,
        end_token_ids=(),
        pad_token_id=0,
        temperature=1.0 if scoring.sampled else None,
    )
    draws = torch.zeros(num_all, dtype=torch.float64) if scoring.sampled else None
    with model.evaluating(), LiveBytes(block_bytes=BLOCK_BYTES) as live:
        cache = DynamicCache(config=model.base.config.get_text_config())

        def read(length: int) -> None:
            ids, positions = (torch.zeros(num_all, length, dtype=torch.long) for _ in range(2))
            mask = torch.ones(num_all, cache.get_seq_length() + length, dtype=torch.long)
            seen = torch.ones(num_all, 1, length, mask.shape[1], dtype=torch.bool)
            next_tokens(model.base, ids, None, positions, cache, decoding, draws)
            del mask, seen  # transformers makes one from the other and holds both until here

        read(scoring.prompt)
        peak = live.peak
        if scoring.max_new_tokens > 1:
            # The last token is never read. When the one before it is read, all earlier tokens are in the cache.
            _lengthen(cache, scoring.max_new_tokens - 2)
            live.start_new_peak()
            read(1)
            peak = max(peak, live.peak)
    return int(peak)


def _lengthen(cache: DynamicCache, num_tokens: int) -> None:
    """Append keys and values of `num_tokens` tokens to the cache."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            keys, values = (
                tensor.new_empty(*tensor.shape[:2], num_tokens, tensor.shape[3])
                for tensor in (layer.keys, layer.values)
            )
            cache.update(keys, values, index)


def _model_of_shapes(base: PreTrainedModel, methods: Sequence[Method], mode: Mode) -> PackModel:
    """The pack on the meta device; stand-ins replace fused kernels and, like them, allocate only their results."""
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


def _fused_scores_of_shapes(
    outputs: Tensor, targets: Tensor, weights: Tensor, scale: float = 1.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(outputs)


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    """The bytes of all storages behind the tensors, each once."""
    storages = {storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _attention_of_shapes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Call the GPU's kernel by name, because on the meta device torch would choose one that keeps more memory."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return plain_causal_attention(module, query, key, value, attention_mask, **settings)
    y = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=settings.get("scaling"))
    return y[0].transpose(1, 2).contiguous(), None


def _masked_attention_of_shapes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Allocate what transformers' masked attention holds on a GPU: repeated keys and values, the mask as numbers.

    query (B, H, L, d), key and value (B, K, S, d) -> (B, L, H, d).
    """
    num_rows, num_heads, length, _ = query.shape
    bias = query.new_empty(num_rows, 1, length, key.shape[2])
    if num_heads > key.shape[1] and (length > 1 or not SINGLE_QUERIES_ARE_GROUPED):
        key, value = (tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1) for tensor in (key, value))
    y = torch.empty_like(query)
    del bias
    return y.transpose(1, 2).contiguous(), None
