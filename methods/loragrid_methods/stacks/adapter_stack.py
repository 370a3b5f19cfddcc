"""The adapters of several members at one linear layer: tensors with a leading member axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.base_weight import BaseWeight


@dataclass(kw_only=True)
class DrawClock:
    """What a random draw during training depends on besides the member's seed and the layer: where training is."""

    step: int = 0
    worker: int = 0
    micro_batch: int = 0


class AdapterStack(nn.Module):
    """The update that several members add to the output of one frozen linear layer.

    Trainable tensors are `nn.Parameter`s (M, ...); everything else is a buffer, so that nothing can re-enable its
    gradient. Ranks that differ are padded with zeros: padded rows and columns get zero gradients and stay zero.
    """

    rank_axes: Mapping[str, int] = {}
    """Tensor name -> axis, member axis included, along which it is padded to the largest rank of the stack."""

    written_buffers: frozenset[str] = frozenset()
    """The buffers that training changes (Delta-LoRA's reference); all others must keep their bits, and that is checked.

    A stack's own buffers are (M, ...) as its parameters are; those of a module within it are shared.
    """

    needs_base_output: bool = False
    """Whether the update depends on what the frozen layer computes (DoRA): then `forward_with_base` is called."""

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

        x (M, T, d_in), base_output (M, T, d_out), the frozen layer's of the same rows, bias included -> (M, T, d_out).
        """
        raise NotImplementedError

    def before_step(self) -> None:
        """Correct the gradients, after clipping and before the optimizer."""

    def after_step(self, completed: int) -> None:
        """React to an update; `completed` is the number of optimizer steps done."""

    def after_load(self) -> None:
        """React to saved values copied into the stack's tensors, before anything is computed with them."""

    def bind(self) -> None:
        """Called once, when the pack has moved the parameters into its flat buffers."""

    def member_tensors(self, member: int) -> dict[str, Tensor]:
        """Name -> one member's tensors without padding, parameters and persistent buffers alike, as views."""
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
        """PEFT's key after the module's path -> tensor, for one member."""
        raise NotImplementedError

    def peft_shared_tensors(self) -> dict[str, Tensor]:
        """PEFT's key under `base_model.` -> tensor that all layers share."""
        return {}


def per_member(values: Sequence[float]) -> Tensor:
    """Scalars of M members as (M, 1, 1), ready to multiply (M, T, d); float64 until the pack sets the type."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
