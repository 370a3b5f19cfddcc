"""One member of a pack in the form that PEFT loads, and the way back: what such an adapter adds to each weight."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loragrid_methods.stacks.pack import AdapterPack

PREFIX = "base_model.model."
# The PEFT release whose file format this is; PEFT reads files without it as older ones.
PEFT_FORMAT_VERSION = "0.21.0"


def peft_adapter(pack: AdapterPack, member: int, base_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`adapter_config.json` and the tensors of `adapter_model.safetensors` for one member.

    Every layer the member adapts has its tensors here: PEFT loads a file with missing layers without a word, as
    layers that change nothing.

    Raises:
        ValueError: the member's method has no adapter (it trains nothing, or the whole base).
    """
    method = pack.methods[member]
    config = method.peft_config()
    if not config:
        raise ValueError(f"{method.name} has no adapter to export")
    stacks, index = pack.member_stacks(member)
    tensors: dict[str, Tensor] = {}
    for layer, stack in stacks.items():
        for key, tensor in stack.peft_tensors(index).items():
            tensors[f"{PREFIX}{layer}.{key}"] = tensor
        for key, tensor in stack.peft_shared_tensors().items():
            tensors[f"base_model.{key}"] = tensor
    targets = method.target_layers(pack.layers)
    missing = {layer.name for layer in targets} - stacks.keys()
    assert not missing, f"the export of {method.name} lacks {sorted(missing)}"
    target_modules = config["target_modules"]
    config |= {
        "target_modules": list(target_modules) if isinstance(target_modules, tuple) else target_modules,
        "base_model_name_or_path": base_name,
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in targets),
        "peft_version": PEFT_FORMAT_VERSION,
        "inference_mode": True,
    }
    # Copies: training may go on, and a member of a pack of one is a view of its live weights.
    return config, {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }


def weight_updates(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer name -> what the adapter adds to the layer's weight, (d_out, d_in) in float64; reads PEFT's format.

    Raises:
        ValueError: a `peft_type` other than LORA and VERA.
    """
    kind = config["peft_type"]
    updates: dict[str, Tensor] = {}
    if kind == "LORA":
        rank = config["r"]
        scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                b = tensors[f"{layer}.lora_B.weight"]
                updates[layer.removeprefix(PREFIX)] = scaling * (b.double() @ a.double())
    elif kind == "VERA":
        shared_a, shared_b = tensors["base_model.vera_A"].double(), tensors["base_model.vera_B"].double()
        for key, d in tensors.items():
            if key.endswith(".vera_lambda_d"):
                layer = key.removesuffix(".vera_lambda_d")
                scale = tensors[f"{layer}.vera_lambda_b"].double()
                # d_in is the layer's own and not in the file: the caller cuts the columns to the weight's.
                updates[layer.removeprefix(PREFIX)] = scale.unsqueeze(1) * (
                    shared_b[: len(scale)] * d.double() @ shared_a
                )
    else:
        raise ValueError(f"peft_type: {kind!r} cannot be merged; allowed: LORA, VERA")
    return updates
