"""LoRA-FA, version 1 (Zhang et al., 2023, arXiv 2308.03303): LoRA with A frozen at its random draw."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor, nn

from loragrid_methods.lora import LoRA, LoRAStack
from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.contract import Card, ParameterCount
from loragrid_methods.stacks.low_rank_stack import rank_class
from loragrid_methods.stacks.targets import LayerShape


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA whose A never trains: backward keeps z = x A^T (T x rank) and not x (T x d_in)."""

    card: ClassVar[Card] = Card(
        title="LoRA-FA",
        authors="Zhang et al.",
        year=2023,
        arxiv="2308.03303",
        paper="LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning (version 1)",
        update_rule="W = W0 + (alpha/r) B A; A stays at its random draw, B trains with AdamW.",
        differences="None in the update. A is a buffer, not a parameter with its gradient switched off, so nothing can "
        "re-enable it. Much of the memory LoRA-FA saves elsewhere is a float32 copy of x that LoRA here never makes: "
        "compare saved bytes within one engine. Version 2 of the paper is `lora_fa_projected`.",
        peft_equivalent="LoraConfig, with requires_grad off for lora_A, and a plain AdamW",
    )
    trained: ClassVar[tuple[str, ...]] = ("lora_B",)

    def stack_key(self) -> Hashable:
        return ("lora_fa", rank_class(self.rank), self.dropout, self.targets)

    @classmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        return {layer.name: LoRAFAStack(members, seeds, layer) for layer in members[0].target_layers(layers)}

    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        trainable = sum(self.rank * layer.out_features for layer in self.target_layers(layers))
        return replace(super().num_parameters(layers), trainable=trainable)


class LoRAFAStack(LoRAStack):
    """`LoRAStack` with lora_A (M, r, d_in) as a buffer; all shapes are the same."""

    lora_A: Tensor

    def __init__(self, members: Sequence[LoRAFA], seeds: Sequence[int], layer: LayerShape) -> None:
        super().__init__(members, seeds, layer)
        drawn = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", drawn)
