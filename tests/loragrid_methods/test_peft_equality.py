"""With equal weights LoraGrid computes the same outputs, gradients and optimizer steps as PEFT."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

from tests.support.pack_training import (
    LINEAR_LAYERS,
    Member,
    PackRun,
    TinyModel,
    small_method,
    token_ids,
)
from tests.support.peft_reference import assert_close, held_by_layer, peft_losses, randomise, targets_of

LORA_LIKE = [
    ("lora", {"alpha": 6.0}),
    ("lora", {"alpha": 6.0, "rslora": True}),
    ("lora_plus", {}),
    ("lora_fa", {}),
    ("lora_fa_projected", {"rslora": True}),
    ("delta_lora", {}),
]
NUM_STEPS = 5


def peft_lora(base: Any, run: PackRun) -> Any:
    """PEFT's model on `base` with the factors that the run's only member holds."""
    method: Any = run.members[0].method
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        use_rslora=getattr(method, "rslora", False),
        target_modules=list(method.target_modules),
        fan_in_fan_out=not isinstance(base, TinyModel),
    )
    model = get_peft_model(base, config).double()
    for name, stack in run.pack.member_stacks(0)[0].items():
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        held = stack.member_tensors(0)
        layer.lora_A["default"].weight.data.copy_(held["lora_A"])
        layer.lora_B["default"].weight.data.copy_(held["lora_B"])
    return model


@pytest.mark.parametrize(("name", "fields"), LORA_LIKE, ids=lambda value: value if isinstance(value, str) else "")
def test_outputs_and_gradients_of_low_rank_methods_are_pefts(
    base_of: Callable[[], Any], name: str, fields: dict[str, Any]
) -> None:
    base = base_of()
    run = PackRun(base, [Member(method=small_method(name, target_modules=targets_of(base), **fields))])
    randomise(run, "lora_B")
    reference = base_of()
    model = peft_lora(reference, run)
    losses = peft_losses(model, reference, 0)
    losses.sum().backward()
    assert_close(run.backward(), losses.detach())
    ids = token_ids(reference, 0, 0)
    assert_close(base(input_ids=ids).logits, model(input_ids=ids).logits)
    for layer, stack in run.pack.member_stacks(0)[0].items():
        theirs: Any = model.get_submodule(f"base_model.model.{layer}")
        for factor, parameter in stack.named_parameters():
            assert parameter.grad is not None
            assert_close(parameter.grad[0], getattr(theirs, factor)["default"].weight.grad)


def test_outputs_and_gradients_of_vera_are_pefts(base_of: Callable[[], Any]) -> None:
    base, reference = base_of(), base_of()
    targets = targets_of(base)
    run = PackRun(base, [Member(method=small_method("vera", rank=6, projection_seed=11, target_modules=targets))])
    config = VeraConfig(r=6, projection_prng_key=11, target_modules=list(targets), d_initial=0.1)
    config.fan_in_fan_out = not isinstance(base, TinyModel)
    model = get_peft_model(reference, config).double()
    randomise(run, "vera_lambda_b")
    randomise(run, "vera_lambda_d")
    for name, stack in run.pack.member_stacks(0)[0].items():
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        for key, tensor in stack.member_tensors(0).items():
            getattr(layer, key)["default"].data.copy_(tensor)
    losses = peft_losses(model, reference, 0)
    losses.sum().backward()
    assert_close(run.backward(), losses.detach())
    for name, stack in run.pack.member_stacks(0)[0].items():
        layer = model.get_submodule(f"base_model.model.{name}")
        for key, parameter in stack.named_parameters():
            assert parameter.grad is not None
            assert_close(parameter.grad[0], getattr(layer, key)["default"].grad)


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_veras_draw_and_start_are_pefts_to_the_bit(rank: int) -> None:
    run = PackRun(TinyModel(torch.float32), [Member(method=small_method("vera", rank=rank, projection_seed=3))])
    config = VeraConfig(r=rank, projection_prng_key=3, target_modules=list(LINEAR_LAYERS))
    model = get_peft_model(TinyModel(torch.float32), config)
    for name, stack in run.pack.member_stacks(0)[0].items():
        shared = stack.peft_shared_tensors()
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        assert torch.equal(shared["vera_A"].float(), layer.vera_A["default"])
        assert torch.equal(shared["vera_B"].float(), layer.vera_B["default"])
        for key, tensor in stack.member_tensors(0).items():
            assert torch.equal(tensor.float(), getattr(layer, key)["default"])


@pytest.mark.parametrize(("alpha", "rslora"), [(4.0, False), (6.0, False), (3.0, True)])
def test_projected_lora_fa_steps_equal_those_of_pefts_lorafa_optimizer(
    base_of: Callable[[], Any], alpha: float, rslora: bool
) -> None:
    """In float64, which PEFT's bfloat16 autocast leaves alone.

    PEFT inverts A A^T + 1e-8 I, a relative change of 1e-8 over the smallest eigenvalue of A A^T (above 0.01 here), so
    1e-6 is the closest that can be asked. Its epsilon stands before the bias correction and its decay after the
    update; both are switched off.
    """
    base, reference = base_of(), base_of()
    method = small_method("lora_fa_projected", alpha=alpha, rslora=rslora, target_modules=targets_of(base))
    run = PackRun(base, [Member(method=method, lr=0.02)], schedule=lambda step: 1.0, epsilon=1e-30)
    model = peft_lora(reference, run)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=alpha, lr=0.02)  # type: ignore[arg-type]
    optimizer.param_groups[0]["eps"] = 1e-30
    start = {name: held["lora_A"] for name, held in held_by_layer(run).items()}
    for step in range(NUM_STEPS):
        losses = peft_losses(model, reference, step)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        assert_close(run.step(), losses.detach(), tolerance=1e-6)
    for name, held in held_by_layer(run).items():
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        assert_close(held["lora_B"], layer.lora_B["default"].weight.detach(), tolerance=1e-6)
        assert torch.equal(held["lora_A"], start[name])


def test_the_projection_solves_the_papers_problem_to_the_last_digits() -> None:
    """(1/s^2) g_B (A A^T)^-1 is the X that makes X A closest to g / s, for a random full gradient g."""
    run = PackRun(TinyModel(), [Member(method=small_method("lora_fa_projected", alpha=6.0))])
    run.backward()
    generator = torch.Generator().manual_seed(1)
    stacks = run.pack.member_stacks(0)[0]
    expected = {}
    for name, stack in stacks.items():
        a, parameter = stack.get_buffer("lora_A")[0], stack.get_parameter("lora_B")
        full = torch.randn(parameter.shape[1], a.shape[1], generator=generator, dtype=torch.float64)
        assert parameter.grad is not None
        parameter.grad[0] = 1.5 * full @ a.mT
        expected[name] = torch.linalg.lstsq(a.mT, full.mT / 1.5).solution.mT
    run.pack.before_step()
    for name, stack in stacks.items():
        gradient = stack.get_parameter("lora_B").grad
        assert gradient is not None
        assert_close(gradient[0], expected[name])


def test_steps_of_lora_plus_are_those_of_pefts_loraplus_optimizer(base_of: Callable[[], Any]) -> None:
    base, reference = base_of(), base_of()
    method = small_method("lora_plus", lr_ratio=5.0, target_modules=targets_of(base))
    run = PackRun(base, [Member(method=method, lr=0.01, weight_decay=0.1)], schedule=lambda step: 1.0)
    model = peft_lora(reference, run)
    optimizer = create_loraplus_optimizer(
        model, optimizer_cls=torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=5.0, weight_decay=0.1
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    for step in range(NUM_STEPS):
        losses = peft_losses(model, reference, step)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        assert_close(run.step(), losses.detach())
    for name, held in held_by_layer(run).items():
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        assert_close(held["lora_A"], layer.lora_A["default"].weight.detach())
        assert_close(held["lora_B"], layer.lora_B["default"].weight.detach())
