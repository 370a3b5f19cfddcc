"""PiSSA (Meng et al., 2024, arXiv 2404.02948): LoRA that starts at the principal singular vectors of the weight.

Reference code: GraphPKU/PiSSA, PEFT's `pissa_init`. Here no weight is replaced by its residual: the initial pair is
kept, and its product is subtracted from the update.
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
from loragrid_methods.stacks.low_rank import FixedPair, LowRankTerm
from loragrid_methods.stacks.low_rank_stack import LowRankStack, rank_class
from loragrid_methods.stacks.merging import lora_of_two_pairs, merge_lora, scaled_pairs
from loragrid_methods.stacks.targeted import TargetedMethod
from loragrid_methods.stacks.targets import LayerShape


@dataclass(frozen=True, kw_only=True)
class PiSSA(TargetedMethod):
    """y = x W0^T + s x (B A - B0 A0)^T; A and B start at A0 and B0, with s B0 A0 the best rank-r part of W0."""

    card: ClassVar[Card] = Card(
        title="PiSSA",
        authors="Meng et al.",
        year=2024,
        arxiv="2404.02948",
        paper="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        update_rule="W = W_res + (alpha/r) B A with W_res = W0 - (alpha/r) B0 A0; B0 = U sqrt(S/s), A0 = sqrt(S/s) V^T "
        "of the r largest singular values of W0, s = alpha/r. A and B train from there.",
        differences="The base keeps W0, which all members share, and the residual is never written: the update is "
        "s (B A - B0 A0), computed from the differences A - A0 and B - B0, so it is exactly zero at the start. PEFT "
        "rounds the residual and the first pair to the base's type: that changes a bfloat16 base before training "
        "starts (each rounding by up to 2^-8 of an entry). LoraGrid changes nothing; on a float32 base the two agree. "
        "The full SVD is taken when a pack is built, in float32 (float64 on a float64 base), once per layer for all "
        "members. The start does not depend on the seed: trials that differ only in their seed differ only in "
        "their batches. No dropout, as in the paper.",
        peft_equivalent='LoraConfig(r, lora_alpha, target_modules, init_lora_weights="pissa"). Exported exactly as a '
        "LoRA of rank 2r on the unchanged base.",
    )
    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        require(self.rank >= 1, self.name, "rank", self.rank, "a whole number of at least 1")
        require(0 < self.alpha < math.inf, self.name, "alpha", self.alpha, "a positive number")

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def stack_key(self) -> Hashable:
        return ("pissa", rank_class(self.rank), self.targets)

    def target_layers(self, layers: Sequence[LayerShape]) -> list[LayerShape]:
        """The layers that the settings select.

        Raises:
            ValueError: nothing matches, or a layer has fewer singular values than `rank`.
        """
        targets = super().target_layers(layers)
        for layer in targets:
            most = min(layer.in_features, layer.out_features)
            allowed = f"1 to {most}: {layer.name} has no more singular values"
            require(self.rank <= most, self.name, "rank", self.rank, allowed)
        return targets

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        return {
            layer.name: PiSSAStack(members, base_weight(base.get_submodule(layer.name)))
            for layer in members[0].target_layers(layers)
        }

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        targets = self.target_layers(layers)
        count = sum(self.rank * (layer.in_features + layer.out_features) for layer in targets)
        return ParameterCount(trainable=count, stored=2 * count, working=len(targets))

    def peft_config(self) -> dict[str, Any]:
        return lora_of_two_pairs(self.rank, self.target_modules)

    @classmethod
    def merge(cls, weight: Tensor, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        return merge_lora(weight, config, tensors)


class PiSSAStack(LowRankStack):
    """The PiSSA updates of one linear layer.

    Shapes, with M members, T tokens per member, r the largest rank:
        lora_A, initial_A (M, r, d_in); lora_B, initial_B (M, d_out, r); scaling (M, 1, 1)
        x (M, T, d_in) -> (M, T, d_out)
    """

    rank_axes: Mapping[str, int] = {"lora_A": 1, "lora_B": 2, "initial_A": 1, "initial_B": 2}
    scaling: Tensor
    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, members: Sequence[PiSSA], weight: BaseWeight) -> None:
        super().__init__([member.rank for member in members])
        a, b = principal_pairs(weight, [(member.rank, member.scaling) for member in members])
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("initial_A", a.clone())
        self.register_buffer("initial_B", b.clone())
        self.register_buffer("scaling", per_member([member.scaling for member in members]), persistent=False)

    def term(self) -> LowRankTerm:
        origin = FixedPair(down=self.initial_A, up=self.initial_B)
        return LowRankTerm(down=self.lora_A, up=self.lora_B, scaling=self.scaling, origin=origin)

    def peft_tensors(self, member: int) -> dict[str, Tensor]:
        """A LoRA of rank 2r and scaling 1: lora_A = [A; A0], lora_B = [s B, -s B0]."""
        tensors, scaling = self.member_tensors(member), self.scaling[member]
        return scaled_pairs(
            (tensors["lora_A"], tensors["lora_B"], scaling), (tensors["initial_A"], tensors["initial_B"], -scaling)
        )


@torch.no_grad()
def principal_pairs(weight: BaseWeight, settings: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """A0 (M, r, d_in) and B0 (M, d_out, r) of members with (rank, scaling), zero-padded to the largest rank.

    s B0 A0 is the part of W that belongs to the r largest singular values. An SVD leaves signs open and libraries
    choose them differently, so the entry of largest magnitude in every right singular vector is made positive.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    u, singular, vt = torch.linalg.svd(weight.dense().to(dtype), full_matrices=False)
    signs = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
    u, vt = u * signs.mT, vt * signs
    largest = max(rank for rank, _ in settings)
    a, b = vt.new_zeros(len(settings), largest, vt.shape[1]), u.new_zeros(len(settings), u.shape[0], largest)
    for member, (rank, scaling) in enumerate(settings):
        roots = (singular[:rank] / scaling).sqrt()
        a[member, :rank] = roots.unsqueeze(1) * vt[:rank]
        b[member, :, :rank] = u[:, :rank] * roots
    return a, b
