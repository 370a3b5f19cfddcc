"""What a model does to its head's output: a scale and a cap, read from its config and proven on the model itself."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from loragrid.models.vocabulary import embedding_rows

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Keys of a config by which logits are multiplied: Cohere (`logit_scale`), Falcon-H1 (`lm_head_multiplier`)."""
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Keys by which logits, or the head's input, are divided: Granite and MiniCPM3 (`logits_scaling`), Inkling."""
MULTIPLYING_MODELS = ("hyperclovax",)
"""Model types that multiply by a key of `DIVISORS`."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Keys of a soft cap: Gemma 2 and later, RecurrentGemma, xLSTM."""

PROBED_LOGITS = (-300.0, -60.0, -20.0, -5.0, -1.0, -0.25, 0.0, 0.25, 1.0, 5.0, 20.0, 60.0, 300.0)
"""Head outputs that show a scale and a cap of any customary size."""
NUM_TOKENS = 4
TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-10}
"""The allowed difference, relative to the largest logit, by dtype."""


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """logits = cap * tanh(scale * z / cap) of a head's output z; without a cap, logits = scale * z."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the head's output is already the logits."""
        return self.scale == 1.0 and self.cap is None

    def apply(self, outputs: Tensor) -> Tensor:
        """A head's output -> logits, in any shape and in the dtype of `outputs`."""
        return transformed(outputs, self.scale, self.cap)


IDENTITY = LogitTransform()


def transformed(outputs: Tensor, scale: float, cap: float | None) -> Tensor:
    """`LogitTransform.apply` as a function of numbers, which a compiler takes as constants."""
    scaled = outputs if scale == 1.0 else outputs * scale
    return scaled if cap is None else torch.tanh(scaled / cap) * cap


def slope(logits: Tensor, scale: float, cap: float | None) -> Tensor | float:
    """The derivative of logits with respect to the head's output, from the logits: scale * (1 - (logits / cap)^2)."""
    return scale if cap is None else (1.0 - (logits / cap).square()) * scale


def logit_transform(base: PreTrainedModel) -> LogitTransform:
    """The scale and the cap that the base's config declares; `check_logits` proves them on the model.

    Raises:
        ValueError: the config declares a value that cannot be a scale or a cap.
    """
    return declared_transform(base.config)


def declared_transform(config: PretrainedConfig) -> LogitTransform:
    """As `logit_transform`, from a config."""
    # A model of text and images declares in its text config what its text model does.
    text = config.get_text_config()
    if not any(hasattr(text, key) for key in (*MULTIPLIERS, *DIVISORS, *CAPS)):
        return IDENTITY
    scale = 1.0
    for key in MULTIPLIERS:
        scale *= _declared(text, key) or 1.0
    for key in DIVISORS:
        divisor = _declared(text, key) or 1.0
        scale *= divisor if text.model_type in MULTIPLYING_MODELS else 1.0 / divisor
    caps = [cap for key in CAPS if (cap := _declared(text, key)) is not None]
    return LogitTransform(scale=scale, cap=caps[0] if caps else None)


def _declared(config: PretrainedConfig, key: str) -> float | None:
    value = getattr(config, key, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"model.name: {config.name_or_path}: its config says {key}: {value!r}; allowed: above 0")
    return float(value)


@torch.no_grad()
def check_logits(base: PreTrainedModel) -> None:
    """Check that the head reads the last hidden states, and that logits are the declared transform of its output.

    The head's output is replaced by chosen numbers, so a cap is seen even if the model's own logits are small. It runs
    the model on one short row three times.

    Raises:
        ValueError: they are not. The chunked loss, which calls the head by itself, would compute another loss.
    """
    head, name = base.get_output_embeddings(), f"model.name: {base.name_or_path!r} ({type(base).__name__})"
    if not isinstance(head, nn.Linear):
        what = "has no language-model head" if head is None else f"has a {type(head).__name__} as its head"
        raise ValueError(f"{name} {what}; allowed: models whose logits come from one linear layer")
    transform, precise = logit_transform(base), torch.promote_types(base.dtype, torch.float32)
    ids = torch.arange(NUM_TOKENS, device=base.device).remainder(embedding_rows(base))[None]
    hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    with _watched(head) as inputs:
        own = base(input_ids=ids, use_cache=False).logits.to(precise)
    if not inputs:
        raise ValueError(f"{name} computes its logits without its head; LoraGrid's loss does not support that")
    if own.shape[-1] != head.out_features:
        raise ValueError(
            f"{name} keeps {own.shape[-1]:,} of its head's {head.out_features:,} logits; LoraGrid's loss does not "
            "support that"
        )
    after_head = transform
    if not _is_close(inputs[0], hidden, base.dtype):
        if head.bias is not None or not _is_close(inputs[0], hidden * transform.scale, base.dtype):
            raise ValueError(
                f"{name} changes its last hidden states before its head (further layers, as in encoders); LoraGrid's "
                "loss does not support that"
            )
        after_head = LogitTransform(cap=transform.cap)  # scaling the input of a head without a bias scales its output
    chosen = torch.tensor(PROBED_LOGITS, dtype=base.dtype, device=base.device)
    chosen = chosen.repeat(-(-own.numel() // len(chosen)))[: own.numel()].view(own.shape)
    with _watched(head, chosen):
        shown = base(input_ids=ids, use_cache=False).logits
    outputs = nn.functional.linear(hidden, head.weight, head.bias).to(precise)
    if not (
        _is_close(transform.apply(outputs), own, base.dtype)
        and _is_close(after_head.apply(chosen.to(precise)), shown, base.dtype)
    ):
        raise ValueError(
            f"{name} changes its logits after the head in an unknown way: its config declares {_words(transform)}, and "
            f"the model computes something else; LoraGrid's loss knows a scale ({', '.join(MULTIPLIERS + DIVISORS)}) "
            f"and a soft cap ({', '.join(CAPS)})"
        )


@contextmanager
def _watched(head: nn.Linear, output: Tensor | None = None) -> Iterator[list[Tensor]]:
    """A context that collects the head's inputs and, if given, replaces its output."""
    inputs: list[Tensor] = []

    def watch(module: nn.Module, arguments: tuple[Tensor, ...], own: Tensor) -> Tensor:
        inputs.append(arguments[0])
        return own if output is None else output

    hook = head.register_forward_hook(watch)
    try:
        yield inputs
    finally:
        hook.remove()


def _is_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal but for rounding in `dtype`; where one is not finite, both must be."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.double(), theirs.double()
    if not torch.equal(ours.isfinite(), theirs.isfinite()):
        return False
    ours, theirs = ours.nan_to_num(0.0, 0.0, 0.0), theirs.nan_to_num(0.0, 0.0, 0.0)
    return float((ours - theirs).abs().max()) <= TOLERANCES[dtype] * float(theirs.abs().max())


def _words(transform: LogitTransform) -> str:
    cap = "no cap" if transform.cap is None else f"a cap of {transform.cap:g}"
    return f"a scale of {transform.scale:g} and {cap}"
