"""Members' states on disk: safetensors and JSON, nothing that runs code when it is read."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from loragrid.member_state import MemberState

TENSORS, PROGRESS = "state.safetensors", "progress.json"


def save_checkpoint(states: Mapping[str, MemberState], folder: Path) -> None:
    """Write the states of half-trained trials, by trial id."""
    tensors = {
        f"{trial_id}/{name}": tensor.contiguous()
        for trial_id, state in states.items()
        for name, tensor in state.tensors.items()
    }
    save_file(tensors, folder / TENSORS)
    progress = {trial_id: {"completed": state.completed, "active": state.active} for trial_id, state in states.items()}
    (folder / PROGRESS).write_text(json.dumps(progress))


def load_checkpoint(folder: Path) -> dict[str, MemberState]:
    """The states that `save_checkpoint` wrote, by trial id."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / TENSORS).items():
        trial_id, _, name = key.partition("/")
        tensors.setdefault(trial_id, {})[name] = tensor
    return {
        trial_id: MemberState(tensors=tensors.get(trial_id, {}), **progress)
        for trial_id, progress in json.loads((folder / PROGRESS).read_text()).items()
    }
