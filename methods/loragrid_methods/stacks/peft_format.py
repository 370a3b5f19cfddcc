"""PEFT's adapter format: exports one member of a pack, and splits an adapter file by layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loragrid_methods.stacks.base_layers import BaseLayers, LayerShape
from loragrid_methods.stacks.pack import AdapterPack
from loragrid_methods.stacks.peft_names import shortest_names

PREFIX, SHARED_PREFIX = "base_model.model.", "base_model."
# The PEFT release whose file format is written; PEFT reads files without a version as older ones.
PEFT_FORMAT_VERSION = "0.21.0"


def peft_adapter(pack: AdapterPack, member: int, base_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of `adapter_config.json` and the tensors of `adapter_model.safetensors` for one member.

    Every layer that the member adapts is included: PEFT would load a file with missing layers without a warning and
    leave those layers unchanged.

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
            tensors[f"{SHARED_PREFIX}{key}"] = tensor
    targets = method.target_layers(pack.layers)
    missing = {layer.name for layer in targets} - stacks.keys()
    assert not missing, f"the export of {method.name} lacks {sorted(missing)}"
    config |= {
        "target_modules": _exactly(targets, pack.layers),
        "base_model_name_or_path": base_name,
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in targets),
        "peft_version": PEFT_FORMAT_VERSION,
        "inference_mode": True,
    }
    # Copies, because training may continue, and the tensors may be views of the live weights.
    return config, {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }


def _exactly(targets: Sequence[LayerShape], layers: BaseLayers) -> str | list[str]:
    """`target_modules` that PEFT resolves to exactly these layers, whatever selected them."""
    chosen = [layer.name for layer in targets]
    others = {module.name for module in (*layers, *layers.others)} - {*chosen}
    return shortest_names(chosen, others)


def layer_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer name -> the layer's tensors in an adapter file, as `Method.merge` expects them.

    Each is keyed by PEFT's key without the layer's name. The tensors that all layers share (VeRA's projections) are
    included for every layer.
    """
    shared = {key.removeprefix(SHARED_PREFIX): tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(PREFIX):
            name = key.removesuffix(".weight")
            layer, _, tensor_name = name.rpartition(".")
            layers.setdefault(layer.removeprefix(PREFIX), dict(shared))[tensor_name + key.removeprefix(name)] = tensor
    return layers
