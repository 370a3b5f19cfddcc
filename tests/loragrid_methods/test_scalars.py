"""Hyperparameters that are numbers reach a float64 pack with all their digits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from loragrid_methods import get_method, method_names
from tests.support.pack_training import Member, PackRun, TinyModel, small_method

# A dropout probability is compared with random numbers and stays a Python float: no tensor holds it.
NUMBERS = [
    (name, field)
    for name in method_names()
    for field, default in get_method(name).defaults().items()
    if isinstance(default, float) and field != "dropout"
]


def pack_tensors(name: str, **fields: Any) -> list[Tensor]:
    """All tensors of a float64 pack of one member: parameters, buffers and factors on learning rates."""
    run = PackRun(TinyModel(), [Member(method=small_method(name, **fields))])
    stacks = [tensor for stack in run.pack.stacks() for tensor in (*stack.parameters(), *stack.buffers())]
    return [tensor.detach().clone() for tensor in (*stacks, *(block.multiplier for block in run.pack.blocks))]


def test_the_list_holds_numbers_of_several_methods() -> None:
    assert {("vera", "d_initial"), ("delta_lora", "delta_scale"), ("lora_plus", "lr_ratio")} <= set(NUMBERS)


@pytest.mark.parametrize(("name", "field"), NUMBERS)
def test_digits_beyond_float32_reach_the_pack(name: str, field: str) -> None:
    """0.3 and 0.3 (1 + 1e-12) are one number in float32 and two in float64."""
    one, other = pack_tensors(name, **{field: 0.3}), pack_tensors(name, **{field: 0.3 * (1 + 1e-12)})
    assert all(tensor.dtype == torch.float64 for tensor in one)
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))


def test_vera_starts_at_the_double_that_was_asked_for() -> None:
    run = PackRun(TinyModel(), [Member(method=small_method("vera", d_initial=0.1))])
    for stack in run.pack.stacks():
        d = stack.get_parameter("vera_lambda_d")
        assert (d - 0.1).abs().max().item() <= 1e-15


@pytest.mark.parametrize("name", ["lora", "dora", "delta_lora", "pissa", "lora_fa"])
def test_a_scaling_is_alpha_over_rank_to_the_last_digit(name: str) -> None:
    run = PackRun(TinyModel(), [Member(method=small_method(name, rank=3, alpha=0.7))])
    for stack in run.pack.stacks():
        scaling = stack.get_buffer("scaling").item()
        assert scaling == 0.7 / 3
