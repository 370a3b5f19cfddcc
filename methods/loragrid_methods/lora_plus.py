"""LoRA+ (Hayou et al., 2024, arXiv 2402.12354): LoRA whose B learns faster than its A.

Reference code: nikhil-ghosh-berkeley/loraplus, PEFT's `create_loraplus_optimizer`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from loragrid_methods.lora import LoRA
from loragrid_methods.stacks.contract import Card, require


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    """LoRA with the learning rate of B `lr_ratio` times that of A; a ratio of 1 is LoRA exactly."""

    card: ClassVar[Card] = Card(
        title="LoRA+",
        authors="Hayou et al.",
        year=2024,
        arxiv="2402.12354",
        paper="LoRA+: Efficient Low Rank Adaptation of Large Models",
        update_rule="LoRA, with lr_B = lr_ratio x lr_A; the trial's learning rate is lr_A.",
        differences="None in the update. AdamW decays by lr x weight_decay, so B decays lr_ratio times faster; that is "
        "kept. At a fixed lr_A a win may only be a larger learning rate: compare on an lr x lr_ratio grid.",
        peft_equivalent="LoraConfig with create_loraplus_optimizer(loraplus_lr_ratio)",
    )

    lr_ratio: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.lr_ratio < math.inf, self.name, "lr_ratio", self.lr_ratio, "a positive number")

    def learning_rate_multiplier(self, parameter_name: str) -> float:
        return self.lr_ratio if parameter_name == "lora_B" else 1.0
