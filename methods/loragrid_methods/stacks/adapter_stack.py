"""The adapters of several members at one linear layer: tensors with a leading member axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.base_weight import BaseWeight


@dataclass(kw_only=True)
class DrawClock:
    """The position in training; random draws depend on it, on the member's seed and on the layer."""

    step: int = 0
    worker: int = 0
    micro_batch: int = 0


class AdapterStack(nn.Module):
    """The update that several members add to the output of one frozen linear layer.

    Trainable tensors are `nn.Parameter`s (M, ...); everything else is a buffer, so nothing can re-enable its gradient.
    Smaller ranks are padded with zeros: padded rows and columns get zero gradients and stay zero.
    """

    rank_axes: Mapping[str, int] = {}
    """Tensor name -> the axis (the member axis is 0) that is padded to the largest rank of the stack."""

    written_buffers: frozenset[str] = frozenset()
    """The buffers that training changes (Delta-LoRA's reference). A check ensures that all others keep their bits.

    A stack's own buffers are (M, ...), like its parameters; all members share the buffers of its submodules.
    """

    needs_base_output: bool = False
    """Whether the update depends on the frozen layer's output (DoRA); if so, `forward_with_base` replaces `forward`."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.clock = DrawClock()

    @property
    def num_members(self) -> int:
        """M, the length of the member axis."""
        return len(self.ranks)

    def forward(self, x: Tensor) -> Tensor:
        """The update: x (M, T, d_in) -> (M, T, d_out)."""
        raise NotImplementedError

    def forward_with_base(self, x: Tensor, base_output: Tensor, weight: BaseWeight) -> Tensor:
        """The update of a stack with `needs_base_output`.

        x (M, T, d_in), base_output (M, T, d_out) -> (M, T, d_out). `base_output` is the frozen layer's output for x,
        bias included.
        """
        raise NotImplementedError

    def before_step(self) -> None:
        """Correct the gradients; called after clipping and before the optimizer."""

    def after_step(self, completed: int) -> None:
        """Called after an optimizer step; `completed` is the number of steps done."""

    def after_load(self) -> None:
        """Called when saved values have been copied into the stack's tensors, before anything is computed with them."""

    def bind(self) -> None:
        """Called once, when the pack has moved the parameters into its flat buffers."""

    def member_tensors(self, member: int) -> dict[str, Tensor]:
        """Name -> view of one member's parameter or persistent buffer, without padding."""
        return {
            name: self.without_padding(name, tensor[member], member)
            for name, tensor in self.state_dict(keep_vars=False).items()
        }

    def without_padding(self, name: str, tensor: Tensor, member: int) -> Tensor:
        """One member's tensor (no member axis) cut to the member's own rank."""
        if name not in self.rank_axes:
            return tensor
        return tensor.narrow(self.rank_axes[name] - 1, 0, self.ranks[member])

    def peft_tensors(self, member: int) -> dict[str, Tensor]:
        """PEFT's key without the module's path -> tensor, for one member."""
        raise NotImplementedError

    def peft_shared_tensors(self) -> dict[str, Tensor]:
        """PEFT's key without the prefix `base_model.` -> tensor that all layers share."""
        return {}


def per_member(values: Sequence[float]) -> Tensor:
    """Scalars of M members as (M, 1, 1), ready to multiply (M, T, d); float64 until the pack casts them."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
