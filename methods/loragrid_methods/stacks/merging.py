"""Adapters in PEFT's LoRA format: joins two pairs into one, and merges an adapter into a weight."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

# The keys of every adapter's configuration, besides the settings of its kind.
COMMON_SETTINGS = frozenset(
    {
        "peft_type",
        "target_modules",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "bias",
        "fan_in_fan_out",
        "peft_version",
        "inference_mode",
    }
)


def merge_lora(
    weight: Tensor, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, more: Collection[str] = ()
) -> Tensor:
    """W + s B A for weight (d_out, d_in), with `lora_A.weight` (r, d_in) and `lora_B.weight` (d_out, r), in float64.

    `more`: settings and tensors of a kind that extends LoRA, which the caller handles itself.

    Raises:
        ValueError: the adapter is of another kind.
    """
    settings = {"r", "lora_alpha", "lora_dropout", "use_rslora", *more}
    check_adapter(config, tensors, kind="LORA", settings=settings, keys={"lora_A.weight", "lora_B.weight", *more})
    rank = config["r"]
    scaling: float = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return weight + scaling * (tensors["lora_B.weight"].double() @ tensors["lora_A.weight"].double())


def check_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    settings: Collection[str],
    keys: Collection[str],
) -> None:
    """Refuse an adapter with anything that the merge does not handle, because the result would be wrong.

    Raises:
        ValueError: the adapter has another `peft_type`, a setting that is switched on and not in `settings`, or a
            tensor not in `keys`.
    """
    if config["peft_type"] != kind:
        raise ValueError(f"peft_type: {config['peft_type']!r} cannot be merged by this method; allowed: {kind}")
    for name, value in config.items():
        if value and name not in COMMON_SETTINGS and name not in settings:
            allowed = ", ".join(sorted(settings))
            raise ValueError(f"{name}: {value!r} cannot be merged by this method; allowed: {allowed}")
    for key in tensors:
        if key not in keys:
            raise ValueError(f"tensor {key!r} cannot be merged by this method; allowed: {', '.join(sorted(keys))}")


def lora_of_two_pairs(rank: int, target_modules: str | tuple[str, ...]) -> dict[str, Any]:
    """The configuration of a LoRA of rank 2r and scaling 1; `scaled_pairs` multiplies the scalings into lora_B."""
    return {
        "peft_type": "LORA",
        "r": 2 * rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": target_modules,
    }


def scaled_pairs(first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The pairs (A, B, f) and (C, D, g) as one LoRA: lora_A = [A; C] (2r, d_in), lora_B = [f B, g D] (d_out, 2r)."""
    (a, b, factor), (c, d, other) = first, second
    return {
        "lora_A.weight": torch.cat([a, c], dim=0),
        "lora_B.weight": torch.cat([b * factor, d * other], dim=1),
    }
