"""Checks that a base trains rightly as a causal language model, on the path that training uses.

LoraGrid gives a base rows that are padded on the right, without a mask, and takes the loss from its head. That is right
only if no state depends on a later token. Some models pass every other test and fail this one: encoders that load as
causal models, and causal architectures whose config makes them bidirectional.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loragrid.config.experiment import ModelConfig
from loragrid.models.architecture import ALLOWED
from loragrid.models.few_layers import few_layers
from loragrid.models.loading import check_weights, load_config, load_tokenizer, stored_weights
from loragrid.models.logits import check_logits
from loragrid.models.vocabulary import check_vocabulary, embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TOKENS, NUM_KEPT = 24, 10
"""Tokens of a row, and those whose states must not change."""
NOISE = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-10}
"""The allowed relative difference of states between calls of different shapes, by dtype: sums change their order."""
BIDIRECTIONAL_KEYS = (
    ("use_bidirectional_attention", True),
    ("use_bidirectional_attention", "all"),
    ("bidirectional", True),
    ("is_causal", False),
    ("causal", False),
    ("attn_type", "bi"),
    ("is_decoder", False),
)
"""Keys and values by which configs ask for attention to later tokens: Gemma 3, LLM2Vec and others, XLM, XLNet, BERT."""
LARGEST_PIECE = 2**26
"""Numbers of a weight that are looked at together: a whole embedding would need a second one in memory."""


def check_base(
    base: PreTrainedModel, tokenizer: "PreTrainedTokenizerBase | None" = None, *, length: int | None = None
) -> None:
    """Check a loaded base, once, on the device on which it is.

    In this order: its embedding has the tokenizer's special tokens; all weights are finite; states and logits of short
    random rows are finite; a changed suffix leaves the states before it; padding on the right leaves a row's states;
    logits are the declared scale and cap of the head's output. length: tokens of a padded row in training; some models
    choose their rotary frequencies by the length of the batch, so a short row must keep its states at this length.

    It costs seven forwards of one row of at most 24 tokens, one more of `length` tokens, and one read of the weights
    (less than a second per billion on a CPU). With 512 tokens, a base of 135M weights takes one to two seconds on one
    CPU core.

    Raises:
        ValueError: naming model.name, the true reason and the remedy.
    """
    name = str(base.name_or_path)
    check_vocabulary(embedding_rows(base), tokenizer, name=name)
    check_finite_weights(name, base.named_parameters())
    pad = None if tokenizer is None else tokenizer.pad_token_id
    check_rows(base, pad_token_id=pad, length=length)
    check_logits(base)


def check_finite_weights(name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Check that no weight is NaN or infinite; name: the value of model.name.

    Raises:
        ValueError: with the name of the first tensor that holds one, and how many it holds.
    """
    for key, weight in weights:
        if not weight.is_floating_point() or not weight.numel() or _is_finite(weight):
            continue
        num_bad = sum(int((~piece.isfinite()).sum()) for piece in _pieces(weight))
        raise ValueError(
            f"model.name: {name}: the checkpoint is damaged: its tensor {key!r} holds {num_bad:,} values that are NaN "
            f"or infinite (of {weight.numel():,}); every loss would be NaN; get the checkpoint again, or repair it"
        )


def _is_finite(weight: Tensor) -> bool:
    return all(bool(torch.stack(piece.aminmax()).isfinite().all()) for piece in _pieces(weight))


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    flat = weight.detach().reshape(-1) if weight.is_contiguous() else weight.detach()
    return iter(flat.split(LARGEST_PIECE) if flat.dim() == 1 else [flat])


@torch.no_grad()
def check_rows(base: PreTrainedModel, *, pad_token_id: int | None = None, length: int | None = None) -> None:
    """Check that the states of short random rows depend on no later token, padding included, and are finite.

    Raises:
        ValueError: they do, are not finite, or the base cannot process such rows at all.
    """
    kind = f"model.name: {base.name_or_path!r} ({type(base).__name__})"
    rows = _rows(base, pad_token_id)
    # One call per row, all of one shape: then equal rows have equal bits, whatever the dtype.
    own, other, padded = (_states(base, rows[row : row + 1], kind) for row in range(len(rows)))
    if not all(states.isfinite().all() for states in (own, other, padded)):
        raise ValueError(
            f"{kind}: its hidden states are NaN or infinite in {base.dtype}, although all weights are finite; try a "
            "model.dtype with a larger range or finer steps (float32)"
        )
    leak = max(_difference(states, own) for states in (other, padded))
    if 0 < leak <= NOISE[base.dtype] and base.dtype == torch.bfloat16:
        # Rounding (of a mixture of experts, say) or a small leak: float32 tells which.
        copy = few_layers(base.config, str(base.name_or_path))
        if copy is not None:
            check_rows(copy, pad_token_id=pad_token_id)
    if not leak <= NOISE[base.dtype]:
        raise ValueError(
            f"{kind} is not causal: other later tokens change the states before them (by {leak:.1e}), so it sees the "
            f"tokens that it would learn to predict{_cause(base)}; {ALLOWED}"
        )
    alone = _states(base, rows[:1, :NUM_KEPT], kind)
    _check_padding(base, kind, alone, padded, NUM_TOKENS)
    if length is not None and length > NUM_TOKENS:
        filler = rows[-1:, -1:].expand(1, length - NUM_TOKENS)
        _check_padding(base, kind, alone, _states(base, torch.cat([rows[-1:], filler], dim=1), kind), length)


def _check_padding(base: PreTrainedModel, kind: str, alone: Tensor, padded: Tensor, length: int) -> None:
    difference = _difference(padded, alone)
    if not difference <= NOISE[base.dtype]:
        raise ValueError(
            f"{kind}: padding a row of {NUM_KEPT} tokens to {length:,} changes its states (by {difference:.1e}), so a "
            "row's loss would depend on the rows beside it (some models choose their rotary frequencies by the longest "
            "row); allowed: models whose states depend on a row's own tokens; a smaller data.max_length may help"
        )


def _difference(states: Tensor, expected: Tensor) -> float:
    """The relative difference of the first NUM_KEPT states of two rows (1, L, d)."""
    ours, theirs = states[:, :NUM_KEPT], expected[:, :NUM_KEPT]
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def _cause(base: PreTrainedModel) -> str:
    """The key of the config that makes it so, if one of the known keys says so."""
    config = base.config.get_text_config()
    for key, value in BIDIRECTIONAL_KEYS:
        if key in vars(config) and getattr(config, key) == value:
            return f" (its config says {key}: {value!r})"
    return ""


def _rows(base: PreTrainedModel, pad_token_id: int | None) -> Tensor:
    """Three rows (3, NUM_TOKENS) that are equal up to NUM_KEPT: two with random ends, the last one padded."""
    num_ids = embedding_rows(base)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(num_ids, (1, NUM_TOKENS), generator=generator).repeat(3, 1)
    rows[1, NUM_KEPT:] = (
        rows[1, NUM_KEPT:] + 1 + torch.randint(max(num_ids - 1, 1), (1,), generator=generator)
    ) % num_ids
    pad = pad_token_id if pad_token_id is not None else _declared_pad(base)
    rows[2, NUM_KEPT:] = pad if pad < num_ids else 0
    return rows.to(base.device)


def _declared_pad(base: PreTrainedModel) -> int:
    pad = getattr(base.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _states(base: PreTrainedModel, rows: Tensor, kind: str) -> Tensor:
    """The last hidden states (R, L, d) float64 of rows (R, L), as training computes them."""
    if base.base_model is base:
        raise ValueError(f"{kind}: transformers names no part of it that gives its last hidden states; {ALLOWED}")
    try:
        hidden: Tensor = base.base_model(input_ids=rows, use_cache=False).last_hidden_state
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a model that needs other inputs fails anywhere in its code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{kind} cannot process rows of tokens alone in {base.dtype}: {reason}; {ALLOWED}, some only "
            "in another model.dtype"
        ) from error
    return hidden.double()


def check_before_training(model: ModelConfig) -> None:
    """Check a model of which no process may hold all the weights, such as in the driver of a cluster.

    What follows from code and config (causality, padding, logits) is checked on a copy with one layer of each kind and
    random weights; a config of which no such copy can be built is left to `check_base` in the workers. The vocabulary
    needs only the tokenizer. Weights are read one piece at a time, which takes as long as reading the files; those of
    a hub model that is not downloaded yet are left to the workers.

    Raises:
        ValueError: as `check_base`, and for what `load_base` refuses without reading a weight.
    """
    config, tokenizer = load_config(model), load_tokenizer(model)
    check_vocabulary(config, tokenizer, name=model.name)
    check_weights(model)
    copy = few_layers(config, model.name)
    if copy is not None:
        check_rows(copy, pad_token_id=tokenizer.pad_token_id)
        check_logits(copy)
    check_finite_weights(model.name, stored_weights(model))
