"""AdamW over the stacks of a pack: one update for all members, with every member's own settings.

After Loshchilov & Hutter 2019 (arXiv 1711.05101), in the order of operations of `torch.optim.AdamW`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ParameterBlock:
    """All parameters with one name (such as `lora_B`) of the members that share stacks, over all layers.

    weights, gradients: (m, P), with m members from `start` on; the stacks' own tensors are views of them. multiplier:
    (m, 1), each member's factor on its learning rate. shapes: layer name -> the parameter's shape (m, ...), in the
    order in which P concatenates the layers. is_decayed: whether the members' weight decay applies to it.
    """

    name: str
    start: int
    weights: Tensor
    gradients: Tensor
    multiplier: Tensor
    shapes: Mapping[str, torch.Size]
    is_decayed: bool = True

    @property
    def members(self) -> slice:
        """The block's members within the pack."""
        return slice(self.start, self.start + self.weights.shape[0])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Layer name -> view of `flat` (m, P) in the shape of that layer's parameter."""
        widths = [shape.numel() // shape[0] for shape in self.shapes.values()]
        pieces = flat.split(widths, dim=1)
        return {layer: piece.view(shape) for (layer, shape), piece in zip(self.shapes.items(), pieces, strict=True)}


class MemberAdamW:
    """AdamW with one learning rate, weight decay and clipping norm per member; every vector is (M,)."""

    def __init__(
        self,
        blocks: Sequence[ParameterBlock],
        *,
        weight_decay: Tensor,
        clip_norm: Tensor,
        beta1: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        self.blocks = list(blocks)
        self.weight_decay, self.clip_norm = weight_decay, clip_norm
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.first_moments = [torch.zeros_like(block.weights) for block in self.blocks]
        self.second_moments = [torch.zeros_like(block.weights) for block in self.blocks]
        self.num_steps = torch.zeros_like(weight_decay)
        self.update: Callable[..., None] = adamw_update
        """The update of one block; an engine may replace it with a fused one."""

    @torch.no_grad()
    def clip_gradients(self) -> Tensor:
        """Clip each member's gradient to its `clip_norm` (infinity: no limit); return the norms before clipping (M,).

        As `torch.nn.utils.clip_grad_norm_`: the factor is clip_norm / (norm + 1e-6), at most 1.
        """
        squares = torch.zeros_like(self.clip_norm)
        for block in self.blocks:
            squares[block.members] += block.gradients.square().sum(1).to(squares.dtype)
        norms = squares.sqrt()
        factors = (self.clip_norm / (norms + 1e-6)).clamp(max=1.0)
        for block in self.blocks:
            block.gradients.mul_(factors[block.members].unsqueeze(1).to(block.gradients.dtype))
        return norms

    @torch.no_grad()
    def step(self, learning_rate: Tensor, active: Tensor) -> None:
        """Update all members once; those whose `active` (M,) is False keep their weights to the bit."""
        self.num_steps += 1
        correction1 = 1 - self.beta1**self.num_steps
        correction2 = (1 - self.beta2**self.num_steps).sqrt()
        rate = torch.where(active, learning_rate, torch.zeros_like(learning_rate))
        for block, first, second in zip(self.blocks, self.first_moments, self.second_moments, strict=True):
            dtype, members = block.weights.dtype, block.members
            rates = rate[members].unsqueeze(1) * block.multiplier.to(rate.dtype)
            weight_decay = self.weight_decay[members].unsqueeze(1) if block.is_decayed else torch.zeros_like(rates)
            self.update(
                block.weights,
                block.gradients,
                first,
                second,
                decay=(1 - rates * weight_decay).to(dtype),
                scale=(rates / correction1[members].unsqueeze(1)).to(dtype),
                correction2=correction2[members].unsqueeze(1).to(dtype),
                active=active[members].unsqueeze(1),
                beta1=self.beta1,
                beta2=self.beta2,
                epsilon=self.epsilon,
            )

    def zero_gradients(self) -> None:
        """Set every gradient to zero, in place, because the stacks' `.grad` are views of the blocks' gradients."""
        for block in self.blocks:
            block.gradients.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a continued run needs besides the weights, by name; the tensors themselves, not copies."""
        tensors = {"num_steps": self.num_steps}
        for index in range(len(self.blocks)):
            tensors[f"first_moment.{index}"] = self.first_moments[index]
            tensors[f"second_moment.{index}"] = self.second_moments[index]
        return tensors

    def member_moments(self, member: int) -> Iterator[tuple[str, str, str, Tensor]]:
        """Yield one member's (moment's name, layer, parameter's name, moment without member axis but with padding)."""
        for block, first, second in zip(self.blocks, self.first_moments, self.second_moments, strict=True):
            if member in range(block.members.start, block.members.stop):
                for kind, flat in (("first_moment", first), ("second_moment", second)):
                    for layer, moment in block.views(flat).items():
                        yield kind, layer, block.name, moment[member - block.start]


def adamw_update(
    weights: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    decay: Tensor,
    scale: Tensor,
    correction2: Tensor,
    active: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """AdamW on one block in place: weights, gradients and moments (m, P); all other tensors (m, 1)."""
    first.lerp_(gradients, 1 - beta1)
    second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    denominator = second.sqrt().div_(correction2).add_(epsilon)
    update = first.div(denominator).mul_(scale)
    # A rate of zero is not enough: NaN times zero would put NaN into an inactive member.
    weights.mul_(decay).sub_(torch.where(active, update, torch.zeros_like(update)))
