"""The bytes that a method keeps for the backward pass: LoRA keeps x and z, LoRA-FA only z, VeRA only u."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loragrid_methods.stacks.pack import AdapterPack
from tests.support.pack_training import small_method

NUM_TOKENS, WIDTH, RANK = 64, 48, 4
OUT_FEATURES = (40, 24, 56)
SCALARS_OF_DELTA = 2 * 8
"""Delta-LoRA's two factors per layer and member depend on whether it has started: made anew, one number each."""


class Siblings(nn.Module):
    """Linear layers that share their input, as q, k and v do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, width, dtype=dtype) for width in OUT_FEATURES)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def saved_bytes(names: list[str], dtype: torch.dtype = torch.float64, **fields: Any) -> int:
    """Bytes of the distinct storages that autograd keeps, the base's and the adapters' own tensors apart."""
    base = Siblings(dtype)
    adapters = torch.promote_types(dtype, torch.float32)
    pack = AdapterPack(
        base, [(small_method(name, **fields), index) for index, name in enumerate(names)], dtype=adapters
    )
    pack.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*base.parameters(), *base.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(len(names), NUM_TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = base(x)
    assert all(output.requires_grad for output in outputs)
    return sum(saved.values())


def size(width: int, dtype: torch.dtype = torch.float64) -> int:
    """Bytes of one member's activations of this width."""
    return NUM_TOKENS * width * dtype.itemsize


@pytest.mark.parametrize("num_members", [1, 3])
def test_lora_keeps_z_per_layer_and_a_shared_x_once(num_members: int) -> None:
    for name in ("lora", "lora_plus"):
        assert saved_bytes([name] * num_members) == num_members * (size(WIDTH) + 3 * size(RANK))


@pytest.mark.parametrize("num_members", [1, 3])
def test_lora_fa_keeps_z_and_not_x(num_members: int) -> None:
    for name in ("lora_fa", "lora_fa_projected"):
        assert saved_bytes([name] * num_members) == num_members * 3 * size(RANK)


@pytest.mark.parametrize("num_members", [1, 3])
def test_vera_keeps_u_and_no_product_of_the_output_width(num_members: int) -> None:
    assert saved_bytes(["vera"] * num_members) == num_members * 3 * size(RANK)


@pytest.mark.parametrize("num_members", [1, 3])
def test_delta_lora_keeps_what_lora_keeps(num_members: int) -> None:
    expected = num_members * (size(WIDTH) + 3 * size(RANK) + 3 * SCALARS_OF_DELTA)
    assert saved_bytes(["delta_lora"] * num_members) == expected


def test_the_frozen_base_keeps_nothing_here() -> None:
    assert saved_bytes(["lora", "frozen"]) == 2 * size(WIDTH) + 3 * size(RANK)


def test_float32_adapters_keep_no_float32_copy_of_a_bfloat16_x() -> None:
    bf16 = torch.bfloat16
    assert saved_bytes(["lora"], bf16) == size(WIDTH, bf16) + 3 * size(RANK, bf16)
    assert saved_bytes(["lora_fa"], bf16) == 3 * size(RANK, bf16)
    assert saved_bytes(["vera"], bf16) == 3 * size(RANK, bf16)


def test_dropout_costs_a_copy_and_a_mask_per_layer() -> None:
    plain = saved_bytes(["lora"])
    assert saved_bytes(["lora"], dropout=0.5) == plain - size(WIDTH) + 3 * 2 * size(WIDTH)
