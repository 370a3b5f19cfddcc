"""DoRA (Liu et al., 2024, arXiv 2402.09353): LoRA changes the direction of each row of W, a trained vector its length.

Reference code: PEFT's `DoraLinearLayer`, NVlabs/DoRA.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.adapter_stack import AdapterStack, per_member
from loragrid_methods.stacks.base_weight import BaseWeight, base_weight
from loragrid_methods.stacks.contract import Card, ParameterCount, require
from loragrid_methods.stacks.draws import draw_lora_A
from loragrid_methods.stacks.low_rank import LowRankTerm, low_rank_update, times_vectors, updated_row_norms
from loragrid_methods.stacks.low_rank_stack import rank_class
from loragrid_methods.stacks.merging import merge_lora
from loragrid_methods.stacks.targeted import TargetedMethod
from loragrid_methods.stacks.targets import LayerShape


@dataclass(frozen=True, kw_only=True)
class DoRA(TargetedMethod):
    """y = x [ m (W0 + s B A) / ||W0 + s B A|| ]^T; the norm is that of each row (output feature), m (d_out) trains."""

    card: ClassVar[Card] = Card(
        title="DoRA",
        authors="Liu et al.",
        year=2024,
        arxiv="2402.09353",
        paper="DoRA: Weight-Decomposed Low-Rank Adaptation",
        update_rule="W = m (W0 + (alpha/r) B A) / ||W0 + (alpha/r) B A||, row by row; A, B and the magnitudes m train, "
        "m starts as ||W0||. The norm is a constant to the gradient (the paper's section 4.3; PEFT detaches it too). "
        "`rslora: true` scales by alpha/sqrt(r).",
        differences="None in the update. The norms come from ||W_i||^2 + 2 s B_i (A W_i^T) + s^2 B_i (A A^T) B_i^T, in "
        "float32 or better: no second weight is made (PEFT forms W + s B A, in the base's type). A W^T costs about as "
        "much as the base layer on r more rows per member and layer, at every forward, including that of a "
        "generated token. Backward keeps one tensor of the width of the output per layer, which LoRA does not. No "
        "dropout: PEFT multiplies the dropped input with the frozen weight a second time. A row of W0 that is zero has "
        "no direction and stays zero; in PEFT it is NaN.",
        peft_equivalent="LoraConfig(r, lora_alpha, use_rslora, target_modules, use_dora=True)",
    )
    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_magnitude_vector")
    draws_from_seed: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 1, self.name, "rank", self.rank, "a whole number of at least 1")
        require(0 < self.alpha < math.inf, self.name, "alpha", self.alpha, "a positive number")

    @property
    def scaling(self) -> float:
        """s, the factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def stack_key(self) -> Hashable:
        return ("dora", rank_class(self.rank), self.targets)

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        return {
            layer.name: DoRAStack(members, seeds, layer, base_weight(base.get_submodule(layer.name)))
            for layer in members[0].target_layers(layers)
        }

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        targets = self.target_layers(layers)
        num_outputs = sum(layer.out_features for layer in targets)
        count = num_outputs + sum(self.rank * (layer.in_features + layer.out_features) for layer in targets)
        return ParameterCount(trainable=count, stored=count, working=len(targets) + num_outputs)

    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "use_rslora": self.rslora,
            "use_dora": True,
            "target_modules": self.target_modules,
        }

    @classmethod
    def merge(cls, weight: Tensor, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        updated = merge_lora(weight, config, tensors, more={"use_dora", "lora_magnitude_vector"})
        norms = torch.linalg.vector_norm(updated, dim=1)
        return updated * (tensors["lora_magnitude_vector"].double() / without_zeros(norms)).unsqueeze(1)


class RowNorms(nn.Module):
    """||W_i|| of every row of a layer's frozen weight, (d_out,), shared by all members."""

    row_norms: Tensor

    def __init__(self, weight: BaseWeight) -> None:
        super().__init__()
        self.register_buffer("row_norms", weight.row_norms(), persistent=False)


class DoRAStack(AdapterStack):
    """The DoRA updates of one linear layer.

    Shapes, with M members, T tokens per member, r the largest rank:
        lora_A (M, r, d_in), lora_B (M, d_out, r), lora_magnitude_vector (M, d_out), scaling (M, 1, 1)
        x (M, T, d_in), base_output (M, T, d_out) -> (M, T, d_out)

    With u = s (x A^T) B^T and c = m / ||W + s B A|| the layer's output is c (x W^T + u) + bias. Written as an
    update this is u + (c - 1) (x W^T + u), which is exactly zero at the start, when u is 0 and c is 1.
    """

    rank_axes: Mapping[str, int] = {"lora_A": 1, "lora_B": 2}
    needs_base_output = True
    scaling: Tensor

    def __init__(self, members: Sequence[DoRA], seeds: Sequence[int], layer: LayerShape, weight: BaseWeight) -> None:
        super().__init__([member.rank for member in members])
        self.weight = RowNorms(weight)
        self.lora_A = nn.Parameter(draw_lora_A(seeds, self.ranks, layer.name, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(len(members), layer.out_features, max(self.ranks)))
        self.lora_magnitude_vector = nn.Parameter(self.weight.row_norms.repeat(len(members), 1))
        self.register_buffer("scaling", per_member([member.scaling for member in members]), persistent=False)

    def forward_with_base(self, x: Tensor, base_output: Tensor, weight: BaseWeight) -> Tensor:
        term = LowRankTerm(down=self.lora_A, up=self.lora_B, scaling=self.scaling)
        update = low_rank_update(x, term)
        norms = updated_row_norms(term, weight, self.weight.row_norms)
        change = self.lora_magnitude_vector / without_zeros(norms) - 1.0
        product = base_output if weight.bias is None else base_output - weight.bias
        return update + times_vectors(product + update, change)

    def peft_tensors(self, member: int) -> dict[str, Tensor]:
        tensors = self.member_tensors(member)
        return {
            "lora_A.weight": tensors["lora_A"],
            "lora_B.weight": tensors["lora_B"],
            "lora_magnitude_vector": tensors["lora_magnitude_vector"],
        }


def without_zeros(norms: Tensor) -> Tensor:
    """The norms, with zeros replaced by 1 for division: a row of zeros has magnitude 0 and stays zero."""
    return norms.masked_fill(norms == 0.0, 1.0)
