"""Writes trained members as files: a PEFT adapter, or a whole model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from loragrid.config.experiment import ModelConfig
from loragrid.models.base_files import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    base_config,
    copy_companions,
    read_json,
    set_chat_template,
)
from loragrid.models.loading import load_base, model_folder
from loragrid.models.quiet import quiet_transformers
from loragrid.training.step import PackModel
from loragrid_methods import Method
from loragrid_methods.stacks.peft_format import layer_tensors, peft_adapter
from loragrid_methods.stacks.targets import is_conv1d

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"


def export_member(
    model: PackModel, member: int, base_name: str, folder: Path, *, chat_template: str | None = None
) -> bool:
    """Write one member into `folder`; return False if its method has nothing to write.

    An adapter is written in PEFT's format. A method that trains the base is written as weights and their config. The
    store keeps what training has made and nothing that the base has: an export adds tokenizer and generation config.

    chat_template: written beside it, if the trial was trained with another template than the tokenizer's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.pack.methods[member].peft_config():
        config, tensors = peft_adapter(model.pack, member, base_name)
        save_file(tensors, folder / ADAPTER_TENSORS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    elif not model.pack.methods[member].packable:
        with quiet_transformers():
            model.base.save_pretrained(folder)
        complete_model_folder(folder, None, None)
    else:
        folder.rmdir()
        return False
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    return True


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


def num_adapted_layers(folder: Path) -> int:
    """The number of layers that an adapter in `folder` changes."""
    return len(layer_tensors(load_file(folder / ADAPTER_TENSORS)))


def export_merged(
    model: ModelConfig, adapter: Path, method: type[Method], folder: Path, *, chat_template: str | None = None
) -> None:
    """Write the base with an adapter of `method` merged into it as a model folder of its own, complete.

    chat_template: the template that the trial was trained with; None: the base's own.
    """
    source = model_folder(model)
    base = load_base(model)
    merge_adapter(base, adapter, method)
    with quiet_transformers():
        base.save_pretrained(folder)
    complete_model_folder(folder, source, read_json(source / CONFIG), chat_template)


def complete_model_folder(
    folder: Path, source: Path | None, config: Mapping[str, Any] | None, chat_template: str | None = None
) -> None:
    """Give written weights all else that a model folder needs: config, generation config, tokenizer and template.

    source: the base's folder; None leaves out what only the base has. config: the base's own config.
    """
    written = read_json(folder / CONFIG)
    (folder / CONFIG).write_text(json.dumps(base_config(written, config), indent=2) + "\n", encoding="utf-8")
    if source is None:
        return
    # transformers derives one from the config for a base that has none.
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    copy_companions(source, folder)
    if chat_template is not None:
        set_chat_template(folder, chat_template)
