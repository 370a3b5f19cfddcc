"""The frozen base: nothing trains. Its loss is what every method has to beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.contract import Card, Method, ParameterCount
from loragrid_methods.stacks.targets import LayerShape


@dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """W = W0."""

    card: ClassVar[Card] = Card(
        title="Frozen base",
        authors="",
        year=2018,
        arxiv="",
        paper="The lower reference",
        update_rule="None.",
        differences="None.",
        peft_equivalent="The base model.",
    )

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        return {}

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        return ParameterCount(trainable=0, stored=0)
