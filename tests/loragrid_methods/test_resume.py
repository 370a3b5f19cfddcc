"""A run that is saved and continued in a new pack equals an unbroken run to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from loragrid_methods import get_method, method_names
from tests.support.pack_training import Member, PackRun, TinyModel, in_order, small_method

NUM_STEPS = 4


def members_of(name: str, **fields: Any) -> list[Member]:
    """Two members with settings of their own, or one where the method takes no other."""
    method = small_method(name, **fields)
    settings: list[dict[str, Any]] = [{"seed": 0, "lr": 0.02, "weight_decay": 0.1}, {"seed": 3, "clip_norm": 0.2}]
    return [Member(method=method, **setting) for setting in settings[: 2 if method.packable else 1]]


@torch.no_grad()
def continue_from(state: dict[str, Tensor], completed: int, base: TinyModel, members: list[Member]) -> PackRun:
    """A fresh pack on a fresh base, with the saved values copied in."""
    run = PackRun(base, members, dtype=torch.promote_types(base.head.weight.dtype, torch.float32))
    held = run.pack.state_tensors() | run.optimizer.state_tensors()
    assert held.keys() == state.keys()
    for name, tensor in held.items():
        tensor.copy_(state[name])
    run.pack.after_load()
    run.completed = completed
    return run


def assert_resumes(members: list[Member], dtype: torch.dtype, num_steps: int = NUM_STEPS) -> None:
    whole = PackRun(TinyModel(dtype), members, dtype=torch.promote_types(dtype, torch.float32))
    first = whole.train(num_steps)
    state = whole.state_tensors()
    second = whole.train(num_steps)
    resumed = continue_from(state, num_steps, TinyModel(dtype), members)
    assert first.isfinite().all()
    assert torch.equal(resumed.train(num_steps), second)
    expected = whole.state_tensors()
    for name, tensor in resumed.state_tensors().items():
        assert torch.equal(tensor, expected[name]), name
    for ours, theirs in zip(resumed.base.parameters(), whole.base.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_saving_and_loading_after_k_of_2k_steps_changes_nothing(name: str, dtype: torch.dtype) -> None:
    assert_resumes(members_of(name), dtype)


@pytest.mark.parametrize("start_step", range(2 * NUM_STEPS + 1))
def test_delta_lora_resumes_with_its_snapshot_on_either_side(start_step: int) -> None:
    assert_resumes(members_of("delta_lora", start_step=start_step), torch.float64)


def test_dropout_goes_on_with_the_masks_it_would_have_drawn() -> None:
    assert_resumes(members_of("lora", dropout=0.3), torch.float64)


def test_a_mixed_pack_resumes() -> None:
    members = [member for name in method_names() if get_method(name).packable for member in members_of(name)]
    assert_resumes(in_order(members), torch.float64)


@pytest.mark.parametrize("name", method_names())
def test_training_changes_nothing_that_is_not_saved(name: str) -> None:
    run = PackRun(TinyModel(), members_of(name))
    unsaved = [
        (key, buffer, buffer.clone())
        for stack in run.pack.stacks()
        for key, buffer in stack.named_buffers()
        if key not in stack.state_dict()
    ]
    run.train(3)
    assert all(torch.equal(buffer, before) for _, buffer, before in unsaved)
