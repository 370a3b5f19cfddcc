"""Trained members as files: a PEFT adapter, or a whole model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from loragrid.config.experiment import ModelConfig
from loragrid.models.loading import load_base, load_tokenizer
from loragrid.training.step import PackModel
from loragrid_methods.stacks.peft_format import peft_adapter, weight_updates
from loragrid_methods.stacks.targets import is_conv1d

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"


def export_member(model: PackModel, member: int, base_name: str, folder: Path) -> bool:
    """Write one member into `folder`; False when its method leaves nothing to write.

    An adapter is written in PEFT's format. A method that trains the base is written as a whole model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.pack.methods[member].peft_config():
        config, tensors = peft_adapter(model.pack, member, base_name)
        save_file(tensors, folder / ADAPTER_TENSORS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return True
    if not model.pack.methods[member].packable:
        model.base.save_pretrained(folder)
        return True
    folder.rmdir()
    return False


@torch.no_grad()
def merge_adapter(base: PreTrainedModel, folder: Path) -> None:
    """Add the adapter in `folder` to the weights of `base`, computed in float64 and rounded once.

    Raises:
        ValueError: the adapter names a layer the base does not have; the base is left as it was.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    layers = dict(base.named_modules())
    updates = weight_updates(config, load_file(folder / ADAPTER_TENSORS))
    for name in updates:
        if name not in layers:
            raise ValueError(f"{folder}: the adapter has a layer {name!r}, the model has not")
    for name, update in updates.items():
        layer = layers[name]
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        out_by_in = weight.T if is_conv1d(layer) else weight
        # VeRA's projections are as wide as the widest layer: a narrower one uses the first columns.
        merged = out_by_in.double() + update[:, : out_by_in.shape[1]].to(weight.device)
        out_by_in.copy_(merged)


def export_merged(model: ModelConfig, adapter: Path, folder: Path) -> None:
    """Write the base with the adapter merged into it, and its tokenizer, as a model folder of its own."""
    base = load_base(model)
    merge_adapter(base, adapter)
    base.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
