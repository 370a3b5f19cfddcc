"""Delta-LoRA (Zi et al., 2023, arXiv 2309.02411): LoRA whose low-rank steps also move the frozen weight.

No reference code is public. W itself is never written here: its updates telescope into a second low-rank term.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.adapter_stack import AdapterStack, per_member
from loragrid_methods.stacks.contract import Card, ParameterCount, require
from loragrid_methods.stacks.draws import draw_lora_A
from loragrid_methods.stacks.low_rank import FixedPair, LowRankTerm
from loragrid_methods.stacks.low_rank_stack import LowRankStack, rank_class
from loragrid_methods.stacks.merging import lora_of_two_pairs, merge_lora, scaled_pairs
from loragrid_methods.stacks.targeted import TargetedMethod
from loragrid_methods.stacks.targets import LayerShape


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(TargetedMethod):
    """W_{t+1} = W_t + lambda s (B_{t+1} A_{t+1} - B_t A_t) for every step t > K; A and B train as in LoRA.

    `delta_scale` is the paper's lambda, `start_step` its K.
    """

    card: ClassVar[Card] = Card(
        title="Delta-LoRA",
        authors="Zi et al.",
        year=2023,
        arxiv="2309.02411",
        paper="Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices",
        update_rule="LoRA without dropout; for every step t > K (t counted from 0) also "
        "W_{t+1} = W_t + lambda (alpha/r) (B_{t+1} A_{t+1} - B_t A_t). W has no gradient and is not decayed.",
        differences="W is never written: the updates telescope to W_t = W_0 + lambda s (B_t A_t - B_ref A_ref), where "
        "(A_ref, B_ref) is the pair after K + 1 steps. This is exact in every number format; writing a bfloat16 W "
        "loses 74 to 98 % of the change to rounding. The base stays shared. With lambda constant the adapter is close "
        "to a LoRA of alpha (1 + lambda): compare with that as a control.",
        peft_equivalent="None. Exported exactly as a LoRA of rank 2r.",
    )
    trained: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    draws_from_seed: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16.0
    delta_scale: float = 2.0
    start_step: int = 500

    def __post_init__(self) -> None:
        require(self.rank >= 1, self.name, "rank", self.rank, "a whole number of at least 1")
        require(0 < self.alpha < math.inf, self.name, "alpha", self.alpha, "a positive number")
        require(0 <= self.delta_scale < math.inf, self.name, "delta_scale", self.delta_scale, "0 or more")
        require(self.start_step >= 0, self.name, "start_step", self.start_step, "0 or more")

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    @property
    def snapshot_step(self) -> int:
        """The number of completed steps after which (A, B) is stored as the reference: K + 1."""
        return self.start_step + 1

    def check_steps(self, steps: int) -> None:
        allowed = f"0 to {steps - 2} with {steps} training steps; later than that W never moves and this is LoRA"
        require(self.snapshot_step < steps, self.name, "start_step", self.start_step, allowed)

    def stack_key(self) -> Hashable:
        return ("delta_lora", rank_class(self.rank), self.targets)

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        return {layer.name: DeltaLoRAStack(members, seeds, layer) for layer in members[0].target_layers(layers)}

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        targets = self.target_layers(layers)
        count = sum(self.rank * (layer.in_features + layer.out_features) for layer in targets)
        return ParameterCount(trainable=count, stored=2 * count, working=3 * len(targets))

    def peft_config(self) -> dict[str, Any]:
        return lora_of_two_pairs(self.rank, self.target_modules)

    @classmethod
    def merge(cls, weight: Tensor, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        return merge_lora(weight, config, tensors)


class DeltaLoRAStack(LowRankStack):
    """The Delta-LoRA updates of one linear layer, including the change of W.

    Shapes, with M members, T tokens per member, r the largest rank:
        lora_A, reference_A (M, r, d_in); lora_B, reference_B (M, d_out, r)
        scaling, delta_scale (M, 1, 1); started (M, 1, 1), 1 after the reference was stored, 0 before
        x (M, T, d_in) -> (M, T, d_out)

    With l = delta_scale * started the update is s (1 + l) B A - l s B_ref A_ref. Autograd must treat W as
    a constant: A and B get the gradients of the LoRA term only (scale s), x gets the gradient of the whole update.
    """

    rank_axes: Mapping[str, int] = {"lora_A": 1, "lora_B": 2, "reference_A": 1, "reference_B": 2}
    written_buffers = frozenset({"reference_A", "reference_B", "started"})
    scaling: Tensor
    delta_scale: Tensor
    started: Tensor
    reference_A: Tensor
    reference_B: Tensor

    def __init__(self, members: Sequence[DeltaLoRA], seeds: Sequence[int], layer: LayerShape) -> None:
        super().__init__([member.rank for member in members])
        self.snapshot_steps = [member.snapshot_step for member in members]
        self.lora_A = nn.Parameter(draw_lora_A(seeds, self.ranks, layer.name, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(len(members), layer.out_features, max(self.ranks)))
        self.register_buffer("reference_A", torch.zeros_like(self.lora_A))
        self.register_buffer("reference_B", torch.zeros_like(self.lora_B))
        self.register_buffer("started", torch.zeros(len(members), 1, 1))
        self.register_buffer("scaling", per_member([member.scaling for member in members]), persistent=False)
        self.register_buffer("delta_scale", per_member([member.delta_scale for member in members]), persistent=False)

    def scales(self) -> tuple[Tensor, Tensor]:
        """The factors on B A and on B_ref A_ref, each (M, 1, 1)."""
        moved = self.delta_scale * self.started
        return self.scaling * (1 + moved), -self.scaling * moved

    def term(self) -> LowRankTerm:
        current, reference = self.scales()
        return LowRankTerm(
            down=self.lora_A,
            up=self.lora_B,
            scaling=current,
            gradient_scaling=self.scaling,
            fixed=FixedPair(down=self.reference_A, up=self.reference_B, scaling=reference),
        )

    def after_step(self, completed: int) -> None:
        for member, snapshot_step in enumerate(self.snapshot_steps):
            if completed == snapshot_step:
                self.reference_A[member] = self.lora_A[member]
                self.reference_B[member] = self.lora_B[member]
                self.started[member] = 1.0

    def peft_tensors(self, member: int) -> dict[str, Tensor]:
        """A LoRA of rank 2r and scaling 1: lora_A = [A; A_ref], lora_B = [s(1+l) B, -l s B_ref]."""
        tensors = self.member_tensors(member)
        current, reference = self.scales()
        return scaled_pairs(
            (tensors["lora_A"], tensors["lora_B"], current[member]),
            (tensors["reference_A"], tensors["reference_B"], reference[member]),
        )
