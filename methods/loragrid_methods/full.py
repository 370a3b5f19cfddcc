"""Full fine-tuning: every weight of the base trains. The upper reference, on a base of its own."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.base_layers import BaseLayers, LayerShape
from loragrid_methods.stacks.contract import Card, Method, ParameterCount


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
        differences="With a bfloat16 base the optimizer works on a float32 master copy. As in transformers' Trainer, "
        "weight decay leaves out norms and biases; it applies to embeddings. Weights that get no gradient from text (a "
        "vision tower) stay as they are and do not count. Takes a base of its own: it is never packed with other "
        "trials.",
        peft_equivalent="None; exported as a whole model.",
    )
    packable: ClassVar[bool] = False
    sharding_obstacle: ClassVar[str] = "writes the base, but only a frozen base can be sharded"
    trained: ClassVar[tuple[str, ...]] = ("weights", "norms_and_biases")

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        assert len(members) == 1, "full fine-tuning writes the base: one member only"
        return {"": BaseStack(base, _unmoved(layers).keys())}

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        num_unmoved = sum(_unmoved(layers).values())
        return ParameterCount(trainable=num_base_parameters - num_unmoved, stored=num_base_parameters)

    @classmethod
    def is_decayed(cls, parameter_name: str) -> bool:
        return parameter_name != "norms_and_biases"


def _unmoved(layers: Sequence[LayerShape]) -> Mapping[str, int]:
    """The base's parameters that get no gradient from text (a vision tower) -> their number of values."""
    return layers.unmoved if isinstance(layers, BaseLayers) else {}


# What `Trainer.get_decay_parameter_names` of transformers leaves out, by name; it also leaves out every nn.LayerNorm.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decayed_names(base: nn.Module) -> list[str]:
    """The names of the base's parameters to which weight decay applies, as in transformers' Trainer."""
    norms = [f"{name}." for name, module in base.named_modules() if name and isinstance(module, nn.LayerNorm)]
    return [
        name
        for name, _ in base.named_parameters()
        if not name.startswith(tuple(norms)) and not _NOT_DECAYED.search(name.lower())
    ]


class BaseStack(AdapterStack):
    """The base's own weights as two trainable tensors (1, number of parameters).

    `weights` holds those to which weight decay applies, `norms_and_biases` the others. A tensor that would be empty is
    missing. If the base has the dtype of these tensors, its parameters become views of them. Otherwise they are master
    copies: gradients are added to their gradients as they arrive, and they are rounded into the base after every step.

    unmoved: names of parameters that get no gradient. They stay frozen: weight decay alone would change them.
    """

    def __init__(self, base: nn.Module, unmoved: Collection[str] = ()) -> None:
        super().__init__([0])
        decayed = set(decayed_names(base))
        moved = {name: parameter for name, parameter in base.named_parameters() if name not in unmoved}
        # Tuples, which do not register the base's parameters as the stack's own.
        self.base_parameters = {
            "weights": tuple(parameter for name, parameter in moved.items() if name in decayed),
            "norms_and_biases": tuple(parameter for name, parameter in moved.items() if name not in decayed),
        }
        dtype = torch.promote_types(next(base.parameters()).dtype, torch.float32)
        for name, parameters in self.base_parameters.items():
            if parameters:
                flat = torch.cat([parameter.detach().flatten().to(dtype) for parameter in parameters])
                self.register_parameter(name, nn.Parameter(flat.unsqueeze(0)))

    def bind(self) -> None:
        for parameter, view, grad in self._with_views():
            assert grad is not None
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
        for parameter, view, _ in self._with_views():
            if parameter.dtype != view.dtype:
                parameter.data.copy_(view)

    def _with_views(self) -> Iterator[tuple[nn.Parameter, Tensor, Tensor | None]]:
        """(Parameter of the base, its part of the trained tensors, its part of their gradients)."""
        for name, flat in self.named_parameters():
            parameters = self.base_parameters[name]
            sizes = [parameter.numel() for parameter in parameters]
            views = flat.data[0].split(sizes)
            grads = [None] * len(sizes) if flat.grad is None else flat.grad[0].split(sizes)
            for parameter, view, grad in zip(parameters, views, grads, strict=True):
                yield parameter, view.view(parameter.shape), None if grad is None else grad.view(parameter.shape)

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
