"""The state of a half-trained pack on disk: safetensors and JSON, nothing that runs code when it is read."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loragrid.training import PackModel

TENSORS, PROGRESS = "state.safetensors", "progress.json"


def save_checkpoint(model: PackModel, folder: Path) -> None:
    """Write everything the pack needs to go on; batches and dropout follow from the step and the seeds."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in _state(model).items()}
    save_file(tensors, folder / TENSORS)
    (folder / PROGRESS).write_text(json.dumps({"completed": model.completed}))


@torch.no_grad()
def load_checkpoint(model: PackModel, folder: Path) -> None:
    """Put a saved state into a freshly assembled pack of the same trials.

    Raises:
        ValueError: the checkpoint is of other trials.
    """
    saved, own = load_file(folder / TENSORS), _state(model)
    if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
        raise ValueError(f"{folder}: the checkpoint is of a pack with other trials")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    model.pack.after_load()
    model.completed = int(json.loads((folder / PROGRESS).read_text())["completed"])


def _state(model: PackModel) -> dict[str, Tensor]:
    return {
        **{f"pack.{name}": tensor for name, tensor in model.pack.state_tensors().items()},
        **{f"optimizer.{name}": tensor for name, tensor in model.optimizer.state_tensors().items()},
        "active": model.active,
    }
