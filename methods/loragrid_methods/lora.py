"""LoRA (Hu et al., 2021, arXiv 2106.09685): a trainable low-rank update beside every frozen weight.

Reference code: microsoft/LoRA (loralib), PEFT.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.adapter_stack import AdapterStack, per_member
from loragrid_methods.stacks.contract import Card, ParameterCount, require
from loragrid_methods.stacks.draws import MemberDropout, draw_lora_A
from loragrid_methods.stacks.low_rank import LowRankTerm
from loragrid_methods.stacks.low_rank_stack import LowRankStack, rank_class
from loragrid_methods.stacks.merging import merge_lora
from loragrid_methods.stacks.targeted import TargetedMethod
from loragrid_methods.stacks.targets import LayerShape


@dataclass(frozen=True, kw_only=True)
class LoRA(TargetedMethod):
    """y = x W0^T + s (drop(x) A^T) B^T with s = alpha / rank, or alpha / sqrt(rank) with `rslora`."""

    card: ClassVar[Card] = Card(
        title="LoRA",
        authors="Hu et al.",
        year=2021,
        arxiv="2106.09685",
        paper="LoRA: Low-Rank Adaptation of Large Language Models",
        update_rule="W = W0 + (alpha/r) B A; A and B train. `rslora: true` scales by alpha/sqrt(r) "
        "(Kalajdzievski 2023, arXiv 2312.03732).",
        differences="A starts Kaiming-uniform (a = sqrt(5)), as in the authors' loralib and PEFT; the paper "
        "describes a Gaussian start. The input is kept once in the base's type: no float32 copy of it per adapted "
        "layer.",
        peft_equivalent="LoraConfig(r, lora_alpha, lora_dropout, use_rslora, target_modules)",
    )
    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    draws_from_seed: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 1, self.name, "rank", self.rank, "a whole number of at least 1")
        require(0 < self.alpha < math.inf, self.name, "alpha", self.alpha, "a positive number")
        require(0 <= self.dropout < 1, self.name, "dropout", self.dropout, "0 <= dropout < 1")

    @property
    def scaling(self) -> float:
        """s, the factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def capture_obstacle(self) -> str:
        return f"{self.name}.dropout: the host draws new masks at every step" if self.dropout else ""

    def stack_key(self) -> Hashable:
        return ("lora", rank_class(self.rank), self.dropout, self.targets)

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        return {layer.name: LoRAStack(members, seeds, layer) for layer in members[0].target_layers(layers)}

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        targets = self.target_layers(layers)
        count = sum(self.rank * (layer.in_features + layer.out_features) for layer in targets)
        return ParameterCount(trainable=count, stored=count, working=len(targets))

    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": self.target_modules,
        }

    @classmethod
    def merge(cls, weight: Tensor, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        return merge_lora(weight, config, tensors)


class LoRAStack(LowRankStack):
    """The LoRA updates of one linear layer.

    Shapes, with M members, T tokens per member, r the largest rank:
        lora_A (M, r, d_in), lora_B (M, d_out, r), scaling (M, 1, 1)
        x (M, T, d_in) -> (M, T, d_out)
    """

    rank_axes: Mapping[str, int] = {"lora_A": 1, "lora_B": 2}
    lora_A: Tensor
    scaling: Tensor

    def __init__(self, members: Sequence[LoRA], seeds: Sequence[int], layer: LayerShape) -> None:
        super().__init__([member.rank for member in members])
        if members[0].dropout:
            self.dropout = MemberDropout(probability=members[0].dropout, seeds=tuple(seeds), layer=layer.name)
        self.lora_A = nn.Parameter(draw_lora_A(seeds, self.ranks, layer.name, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(len(members), layer.out_features, max(self.ranks)))
        self.register_buffer("scaling", per_member([member.scaling for member in members]), persistent=False)

    def term(self) -> LowRankTerm:
        return LowRankTerm(down=self.lora_A, up=self.lora_B, scaling=self.scaling)

    def peft_tensors(self, member: int) -> dict[str, Tensor]:
        tensors = self.member_tensors(member)
        return {"lora_A.weight": tensors["lora_A"], "lora_B.weight": tensors["lora_B"]}
