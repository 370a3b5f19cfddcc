"""A member's whole state outside its pack: everything it needs to continue later, in another pack."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # processes that only forward saved states import this module without the models
    from loragrid.training.step import PackModel


@dataclass(frozen=True, kw_only=True)
class MemberState:
    """Everything one member needs to continue; batches, schedule and dropout follow from the step and the seed.

    tensors: weights, buffers and optimizer moments by `kind.layer.name`, without member axis and padding, in main
    memory. active: False once the member has diverged.
    """

    completed: int
    active: bool
    tensors: dict[str, Tensor]


def take_member(model: "PackModel", member: int) -> MemberState:
    """A copy of one member's state."""
    return MemberState(
        completed=model.completed,
        active=bool(model.active[member]),
        tensors={name: tensor.detach().cpu().clone() for name, tensor in _views(model, member).items()},
    )


@torch.no_grad()
def put_member(model: "PackModel", member: int, state: MemberState) -> None:
    """Load a state into a member of a newly built pack; afterwards the caller must call the pack's `after_load`.

    Raises:
        ValueError: the state belongs to another trial.
    """
    views = _views(model, member)
    if views.keys() != state.tensors.keys() or any(views[name].shape != state.tensors[name].shape for name in views):
        raise ValueError("the saved state belongs to another trial")
    for name, view in views.items():
        view.copy_(state.tensors[name])
    model.active[member] = state.active
    model.optimizer.num_steps[member] = state.completed


def _views(model: "PackModel", member: int) -> dict[str, Tensor]:
    stacks, index = model.pack.member_stacks(member)
    views = {
        f"weights.{layer}.{name}": tensor
        for layer, stack in stacks.items()
        for name, tensor in stack.member_tensors(index).items()
    }
    for kind, layer, name, moment in model.optimizer.member_moments(member):
        views[f"{kind}.{layer}.{name}"] = stacks[layer].without_padding(name, moment, index)
    return views
