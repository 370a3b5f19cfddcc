"""Builds LoraGrid's packs on a benchmarked base."""

from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.shapes import SEVEN_LINEARS
from loragrid.training.step import PackModel
from loragrid_methods import Method, get_method
from loragrid_methods.stacks.optimizer import MemberAdamW
from loragrid_methods.stacks.pack import AdapterPack, member_order

LEARNING_RATE, CLIP_NORM, RANK, ALPHA = 1e-4, 1.0, 16, 16.0


def lora(num_members: int = 1) -> list[Method]:
    """LoRA trials of rank 16 on the seven linears."""
    return [_method("lora", rank=RANK, alpha=ALPHA)] * num_members


def mixed(num_members: int = 16) -> list[Method]:
    """The five methods in equal parts, with rank 16 (VeRA: 256)."""
    names = ("lora", "lora_plus", "lora_fa", "delta_lora", "vera")
    methods = []
    for index in range(num_members):
        name = names[index % len(names)]
        fields = {"rank": 256} if name == "vera" else {"rank": RANK, "alpha": ALPHA}
        methods.append(_method(name, **fields | ({"start_step": 1} if name == "delta_lora" else {})))
    return [methods[index] for index in member_order(methods)]


def _method(name: str, **fields: object) -> Method:
    method: Any = get_method(name)
    made: Method = method(target_modules=SEVEN_LINEARS, **fields)
    return made


def build_pack(base: PreTrainedModel, methods: list[Method], num_steps: int) -> PackModel:
    """The methods as members of one pack on `base`, with a constant learning rate; seeds are the members' numbers."""
    device = base.device
    dtype = torch.promote_types(base.dtype, torch.float32)
    members = [(method, seed) for seed, method in enumerate(methods)]
    pack = AdapterPack(base, members, output_layer=base.get_output_embeddings(), dtype=dtype)
    pack.train()
    vector = torch.ones(len(methods), dtype=torch.float64, device=device)
    optimizer = MemberAdamW(
        pack.blocks, weight_decay=0 * vector, clip_norm=CLIP_NORM * vector, beta1=0.9, beta2=0.999, epsilon=1e-8
    )
    return PackModel(
        base=base,
        pack=pack,
        optimizer=optimizer,
        learning_rates=(LEARNING_RATE * vector).expand(num_steps, -1).contiguous(),
        active=torch.ones(len(methods), dtype=torch.bool, device=device),
    )
