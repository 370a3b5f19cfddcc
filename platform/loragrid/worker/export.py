"""Writes trained members as files: a PEFT adapter, or a whole model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from loragrid.config.experiment import ModelConfig
from loragrid.models.loading import load_base, load_tokenizer
from loragrid.training.step import PackModel
from loragrid_methods import Method
from loragrid_methods.stacks.peft_format import layer_tensors, peft_adapter
from loragrid_methods.stacks.targets import is_conv1d

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"


def export_member(model: PackModel, member: int, base_name: str, folder: Path) -> bool:
    """Write one member into `folder`; return False if its method has nothing to write.

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
def merge_adapter(base: PreTrainedModel, folder: Path, method: type[Method]) -> None:
    """Merge the adapter of `method` in `folder` into `base`; computed in float64 and rounded once.

    Raises:
        ValueError: the adapter names a layer the base does not have (the base is left as it was), or is of another
            kind than the method's.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    layers = dict(base.named_modules())
    adapter = layer_tensors(load_file(folder / ADAPTER_TENSORS))
    for name in adapter:
        if name not in layers:
            raise ValueError(f"{folder}: the adapter has a layer {name!r} that the model lacks")
    for name, tensors in adapter.items():
        layer = layers[name]
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        out_by_in = weight.T if is_conv1d(layer) else weight
        on_device = {key: tensor.to(weight.device) for key, tensor in tensors.items()}
        out_by_in.copy_(method.merge(out_by_in.double(), config, on_device))


def export_merged(model: ModelConfig, adapter: Path, method: type[Method], folder: Path) -> None:
    """Write the base with an adapter of `method` merged into it, and its tokenizer, as a model folder of its own."""
    base = load_base(model)
    merge_adapter(base, adapter, method)
    base.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
