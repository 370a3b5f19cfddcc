"""LoRA-FA, version 2 (Zhang et al., arXiv 2308.03303): A frozen, and B's gradient projected through A A^T.

Reference code: PEFT's `create_lorafa_optimizer`.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from loragrid_methods.lora_fa import LoRAFA, LoRAFAStack
from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.contract import Card, ParameterCount
from loragrid_methods.stacks.low_rank_stack import rank_class
from loragrid_methods.stacks.targets import LayerShape


@dataclass(frozen=True, kw_only=True)
class LoRAFAProjected(LoRAFA):
    """LoRA-FA in which AdamW sees (1/s^2) g_B (A A^T)^-1 instead of g_B."""

    card: ClassVar[Card] = Card(
        title="LoRA-FA (projected)",
        authors="Zhang et al.",
        year=2026,
        arxiv="2308.03303",
        paper="LoRA-FA, version 2: the gradient of B that comes closest to full fine-tuning's",
        update_rule="As LoRA-FA, with g_B replaced by (1/s^2) g_B (A A^T)^-1 before AdamW.",
        differences="(A A^T)^-1 is computed once, in float32 or better: A is constant. PEFT computes a pseudo-inverse "
        "of A A^T + 1e-8 I at every step and rounds the product to bfloat16. The projection follows clipping, as in "
        "PEFT, which projects inside the optimizer.",
        peft_equivalent="LoraConfig with create_lorafa_optimizer",
    )

    def stack_key(self) -> Hashable:
        return ("lora_fa_projected", rank_class(self.rank), self.dropout, self.targets)

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        return {layer.name: LoRAFAProjectedStack(members, seeds, layer) for layer in members[0].target_layers(layers)}

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        count = super().num_parameters(layers)
        return replace(count, working=count.working + self.rank**2 * len(self.target_layers(layers)))


class LoRAFAProjectedStack(LoRAFAStack):
    """`LoRAFAStack` with the projection (M, r, r) = (1/s^2) (A A^T)^-1, zero in the padding."""

    projection: Tensor

    def __init__(self, members: Sequence[LoRAFAProjected], seeds: Sequence[int], layer: LayerShape) -> None:
        super().__init__(members, seeds, layer)
        projection = torch.zeros(len(members), max(self.ranks), max(self.ranks), dtype=torch.float64)
        for index, member in enumerate(members):
            rank = member.rank
            gram = self.lora_A[index, :rank].double() @ self.lora_A[index, :rank].double().mT
            # The pseudo-inverse also serves ranks above d_in, where A A^T is singular.
            projection[index, :rank, :rank] = torch.linalg.pinv(gram, hermitian=True) / member.scaling**2
        self.register_buffer("projection", projection, persistent=False)

    def before_step(self) -> None:
        assert self.lora_B.grad is not None
        self.lora_B.grad.copy_(self.lora_B.grad @ self.projection)
