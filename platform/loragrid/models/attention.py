"""Causal attention without a mask: with right padding, no labelled token sees a position that a mask would hide."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

NAME = "loragrid_causal"

TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-10}
"""The allowed relative difference of hidden states, by dtype: another order of sums changes the last bits."""


class NotCausalError(ValueError):
    """The model's attention is more than plain causal; the message says what, as a part of a sentence."""


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Fused causal attention: query (B, H, L, d), key and value (B, K, L, d) with K dividing H -> (B, L, H, d).

    transformers builds no mask for an attention function that it does not know. A step therefore builds, expands and
    synchronizes nothing, and does not repeat keys and values.

    Raises:
        NotCausalError: the model asks for more than plain causal attention.
    """
    if what := _beyond_causal(module, query, settings):
        raise NotCausalError(what)
    return plain_causal_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)


def plain_causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `causal_attention`, without looking at what else the model asks for."""
    assert attention_mask is None, "transformers must not build a mask"
    grouped = query.shape[1] != key.shape[1]
    y = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
    )
    return y.transpose(1, 2).contiguous(), None


def _beyond_causal(module: torch.nn.Module, query: Tensor, settings: dict[str, Any]) -> str:
    """What the model asks for beyond plain causal attention, or "".

    A small cap or a weak sink changes hidden states by less than rounding, until training makes scores larger. So a
    request decides, and not only its effect on some rows.
    """
    window = settings.get("sliding_window")
    if isinstance(window, int) and window < query.shape[2]:
        return f"its window of {window:,} tokens is shorter than the rows ({query.shape[2]:,})"
    if settings.get("softcap") is not None:
        return f"it caps attention scores at {settings['softcap']:g}"
    if settings.get("s_aux") is not None or settings.get("sinks") is not None:
        return "it has attention sinks"
    if settings.get("position_bias") is not None:
        return "it adds a position bias"
    if settings.get("is_causal", getattr(module, "is_causal", None)) is False:
        return "it is not causal"
    return ""


def allow_padding_without_mask(base: PreTrainedModel) -> None:
    """Switch off a warning of some models (GPT-2), because it waits for the device to look for padding."""
    # Rows are padded on the right and attention is causal: no labelled token sees the padding.
    object.__setattr__(base.base_model, "warn_if_padding_and_no_attention_mask", lambda *_: None)


def fixed_attention(base: PreTrainedModel) -> str:
    """Why transformers cannot give the base another attention, or "".

    transformers only logs a warning then. Tried with transformers 5.17 to 5.23.
    """
    if base._can_set_attn_implementation():
        return ""
    return f"{type(base).__name__} has its own attention in transformers, which cannot be replaced"


@torch.no_grad()
def use_causal_attention(base: PreTrainedModel, input_ids: Tensor) -> str:
    """Let `base` use `causal_attention`; return "", or the reason why it keeps its own attention.

    It is tried on `input_ids` (B, L), which should look like training rows. If it changes the hidden states beyond
    rounding, or if the model asks its attention for more (a sliding window shorter than L, a cap, sinks), the model is
    left as it was.
    """
    AttentionInterface.register(NAME, causal_attention)
    allow_padding_without_mask(base)
    if reason := fixed_attention(base):
        return reason
    before = base.config._attn_implementation

    def hidden_states() -> Tensor:
        hidden: Tensor = base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.double()

    expected = hidden_states()
    try:
        base.set_attn_implementation(NAME)
        difference = float((hidden_states() - expected).norm() / expected.norm())
    except NotCausalError as error:
        base.set_attn_implementation(before)
        return f"{type(base).__name__}'s attention is not plain causal: {error}"
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        base.set_attn_implementation(before)
        return f"{type(base).__name__} cannot use another attention ({error})"
    if not difference <= TOLERANCES[base.dtype]:
        base.set_attn_implementation(before)
        return f"{type(base).__name__}'s attention is not plain causal (hidden states differ by {difference:.1e})"
    return ""


@contextmanager
def masked_attention(base: PreTrainedModel) -> Iterator[None]:
    """A context in which `base` uses an attention that takes masks, which padded prompts and a cache need."""
    before = base.config._attn_implementation
    if before != NAME:
        yield
        return
    try:
        base.set_attn_implementation("sdpa")
    except ValueError:  # transformers has no such attention for this model
        base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)
