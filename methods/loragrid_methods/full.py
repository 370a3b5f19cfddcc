"""Full fine-tuning: every weight of the base trains. The upper reference, on a base of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.contract import Card, Method, ParameterCount
from loragrid_methods.stacks.targets import LayerShape


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """W = W0 + dW with dW trained directly; not packable."""

    card: ClassVar[Card] = Card(
        title="Full fine-tuning",
        authors="",
        year=2018,
        arxiv="",
        paper="The baseline of every paper here",
        update_rule="Every weight of the base trains with AdamW.",
        differences="With a bfloat16 base the optimizer works on a float32 master copy. Takes a base of its own: it is "
        "never packed with other trials.",
        peft_equivalent="None; exported as a whole model.",
    )
    packable: ClassVar[bool] = False
    sharding_obstacle: ClassVar[str] = "writes the base, but only a frozen base can be sharded"
    trained: ClassVar[tuple[str, ...]] = ("weights",)

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        assert len(members) == 1, "full fine-tuning writes the base: one member only"
        return {"": BaseStack(base)}

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        return ParameterCount(trainable=num_base_parameters, stored=num_base_parameters)


class BaseStack(AdapterStack):
    """The base's own weights as one trainable tensor `weights` (1, number of parameters).

    If the base has the dtype of `weights`, its parameters become views of it. Otherwise `weights` is a master copy:
    gradients are added to its gradient as they arrive, and it is rounded into the base after every step.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__([0])
        # A tuple, which does not register the base's parameters as the stack's own.
        self.base_parameters = tuple(base.parameters())
        dtype = torch.promote_types(self.base_parameters[0].dtype, torch.float32)
        flat = torch.cat([parameter.detach().flatten().to(dtype) for parameter in self.base_parameters])
        self.weights = nn.Parameter(flat.unsqueeze(0))

    def bind(self) -> None:
        assert self.weights.grad is not None
        for parameter, view, grad in zip(
            self.base_parameters, self._views(self.weights.data), self._views(self.weights.grad), strict=True
        ):
            parameter.requires_grad_(True)
            if parameter.dtype == view.dtype:
                parameter.data, parameter.grad = view, grad
            else:
                parameter.data = view.to(parameter.dtype)
                parameter.register_post_accumulate_grad_hook(_MoveGradient(grad))

    def after_step(self, completed: int) -> None:
        self._round_into_base()

    def after_load(self) -> None:
        self._round_into_base()

    def _round_into_base(self) -> None:
        for parameter, view in zip(self.base_parameters, self._views(self.weights.data), strict=True):
            if parameter.dtype != view.dtype:
                parameter.data.copy_(view)

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat[0].split([parameter.numel() for parameter in self.base_parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.base_parameters, strict=True)]

    def peft_tensors(self, member: int) -> dict[str, Tensor]:
        return {}


class _MoveGradient:
    """Adds a parameter's gradient to its part of the master gradient, and frees it."""

    def __init__(self, destination: Tensor) -> None:
        self.destination = destination

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.destination.add_(parameter.grad)
        parameter.grad = None
