"""The baselines: PEFT's LoRA in a plain training loop (P2) and at its best (P3)."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.packs import ALPHA, CLIP_NORM, LEARNING_RATE, RANK
from benchmarks.shapes import SEVEN_LINEARS
from loragrid.training.loss import labelled_hidden_states, member_losses
from loragrid.training.step import Batch


class PeftLoop:
    """LoRA on the seven linears, float32 adapters under bfloat16 autocast, fused AdamW, clipping.

    P2 is the usual way, with the model's own loss. P3 (`at_its_best`) casts no input, computes the loss in chunks from
    the labelled hidden states and compiles the decoder layers.
    """

    def __init__(self, base: PreTrainedModel, *, at_its_best: bool, autocast: bool = True) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(SEVEN_LINEARS), task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(base, config)
        self.model.train()
        self.base, self.at_its_best, self.autocast = base, at_its_best, autocast
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        if at_its_best:
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.cast_input_dtype_enabled = False
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile(dynamic=False)

    def loss(self, rows: Batch) -> Tensor:
        """The mean loss over all labels."""
        context = torch.autocast("cuda", dtype=torch.bfloat16) if self.autocast else nullcontext()
        with context:
            if not self.at_its_best:
                loss: Tensor = self.model(input_ids=rows.input_ids, labels=rows.input_ids).loss
                return loss
            hidden = self.base.base_model(input_ids=rows.input_ids, use_cache=False).last_hidden_state
        labelled = labelled_hidden_states(hidden, rows.label_positions)
        return member_losses(labelled, rows.label_targets, rows.num_labels, self.base.get_output_embeddings()).sum()

    def step(self, rows: Batch) -> Tensor:
        """Run one optimizer step; return the loss before it, still on the device."""
        self.optimizer.zero_grad()
        loss = self.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        return loss.detach()

    def lora_tensors(self) -> dict[str, Tensor]:
        """`<layer>.lora_A` and `<layer>.lora_B` -> the parameter."""
        return {
            name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }


def step_milliseconds(step: Callable[[], object], num_warm: int, num_timed: int) -> list[float]:
    """Milliseconds of each timed step, by CUDA events."""
    for _ in range(num_warm):
        step()
    times = []
    for _ in range(num_timed):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times
