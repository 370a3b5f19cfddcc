"""PiSSA equals PEFT's on a float32 base, starts at the principal part of every weight, and is exact in bfloat16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loragrid_methods.pissa import principal_pairs
from loragrid_methods.stacks.base_weight import base_weight
from loragrid_methods.stacks.pack import AdapterPack
from loragrid_methods.stacks.targets import adaptable_layers
from tests.support.pack_training import Member, PackRun, TinyModel, small_method, token_ids
from tests.support.peft_reference import adamw_of, assert_close, held_by_layer, peft_losses, targets_of

NUM_STEPS = 20


@pytest.fixture(params=["nn.Linear", "Conv1D"])
def float32_base_of(request: pytest.FixtureRequest, tiny_gpt2_dir: Path) -> Callable[[], Any]:
    """PEFT refuses to start PiSSA on a float64 base."""

    def load_gpt2() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir, dtype=torch.float32)
        return model.eval()

    return (lambda: TinyModel(torch.float32)) if request.param == "nn.Linear" else load_gpt2


def peft_pissa(base: Any, method: Any) -> Any:
    """PEFT's model with its own start; it writes the residual into `base`."""
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=list(method.target_modules),
        init_lora_weights="pissa",
        fan_in_fan_out=not isinstance(base, TinyModel),
    )
    return get_peft_model(base, config)


def signs_between(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 or -1 for each singular vector (r, d_in): which sign it has is open."""
    return (ours * theirs).sum(1).sign()


def test_start_outputs_and_gradients_are_pefts(float32_base_of: Callable[[], Any]) -> None:
    base, reference = float32_base_of(), float32_base_of()
    method = small_method("pissa", alpha=6.0, target_modules=targets_of(base))
    run = PackRun(base, [Member(method=method)], dtype=torch.float32)
    model = peft_pissa(reference, method)
    # float32: an SVD, a residual rounded to it, and two layers in a row.
    for layer, held in held_by_layer(run).items():
        theirs: Any = model.get_submodule(f"base_model.model.{layer}")
        a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        signs = signs_between(held["lora_A"], a)
        assert_close(held["lora_A"], signs.unsqueeze(1) * a.detach(), tolerance=1e-5)
        assert_close(held["lora_B"], signs * b.detach(), tolerance=1e-5)
    losses = peft_losses(model, reference, 0)
    losses.sum().backward()
    assert_close(run.backward(), losses.detach(), tolerance=1e-6)
    ids = token_ids(reference, 0, 0)
    assert_close(base(input_ids=ids).logits, model(input_ids=ids).logits, tolerance=1e-5)
    for layer, stack in run.pack.member_stacks(0)[0].items():
        theirs = model.get_submodule(f"base_model.model.{layer}")
        signs = signs_between(held_by_layer(run)[layer]["lora_A"], theirs.lora_A["default"].weight)
        ours_a, ours_b = (stack.get_parameter(name).grad for name in ("lora_A", "lora_B"))
        assert ours_a is not None
        assert ours_b is not None
        assert_close(ours_a[0], signs.unsqueeze(1) * theirs.lora_A["default"].weight.grad, tolerance=1e-4)
        assert_close(ours_b[0], signs * theirs.lora_B["default"].weight.grad, tolerance=1e-4)


def test_twenty_steps_of_adamw_are_those_on_a_written_residual(base_of: Callable[[], Any]) -> None:
    """In float64, where PEFT has no start of its own: PEFT's LoRA with our pair, on a base from which it was taken."""
    base, reference = base_of(), base_of()
    method: Any = small_method("pissa", target_modules=targets_of(base))
    run = PackRun(base, [Member(method=method, lr=0.003, weight_decay=0.1)], schedule=lambda step: 1.0)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=list(method.target_modules),
        fan_in_fan_out=not isinstance(base, TinyModel),
    )
    model = get_peft_model(reference, config).double()
    for name, held in held_by_layer(run).items():
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(held["lora_A"])
        layer.lora_B["default"].weight.data.copy_(held["lora_B"])
        principal = method.scaling * held["lora_B"] @ held["lora_A"]
        layer.base_layer.weight.data -= principal if isinstance(base, TinyModel) else principal.mT
    optimizer = adamw_of(model, lr=0.003, weight_decay=0.1)
    for step in range(NUM_STEPS):
        losses = peft_losses(model, reference, step)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        assert_close(run.step(), losses.detach(), tolerance=1e-10)
    for name, held in held_by_layer(run).items():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert_close(held["lora_A"], layer.lora_A["default"].weight.detach(), tolerance=1e-8)
        assert_close(held["lora_B"], layer.lora_B["default"].weight.detach(), tolerance=1e-8)


def test_twenty_steps_on_a_float32_base_are_pefts(
    float32_base_of: Callable[[], Any],
) -> None:
    base, reference = float32_base_of(), float32_base_of()
    method: Any = small_method("pissa", target_modules=targets_of(base))
    run = PackRun(base, [Member(method=method, lr=1e-3)], schedule=lambda step: 1.0, dtype=torch.float32)
    model = peft_pissa(reference, method)
    optimizer = adamw_of(model, lr=1e-3, weight_decay=0.0)
    first = last = torch.zeros(1)
    for step in range(NUM_STEPS):
        losses = peft_losses(model, reference, step % 2)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        run.completed = step % 2  # which tokens a step takes goes by their number
        ours = run.step()
        first, last = (ours if step == 0 else first), ours
        assert_close(ours, losses.detach(), tolerance=1e-4)
    assert (first - last).abs().item() > 0.05


def test_a_bfloat16_base_keeps_its_output_unlike_pefts() -> None:
    base, reference, ids = TinyModel(torch.bfloat16), TinyModel(torch.bfloat16), token_ids(TinyModel(), 0, 0)
    method: Any = small_method("pissa", target_modules=targets_of(base))
    before = base(input_ids=ids).logits
    AdapterPack(base, [(method, 0)], output_layer=base.head)
    assert torch.equal(base(input_ids=ids).logits, before)
    weights = {layer.name: reference.get_submodule(layer.name).weight for layer in adaptable_layers(reference)}
    whole = {name: weight.detach().double() for name, weight in weights.items() if isinstance(weight, Tensor)}
    model = peft_pissa(reference, method)
    layer: Any = model.get_submodule("base_model.model.blocks.0.up_proj")
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    assert all(torch.equal(factor, factor.bfloat16().double()) for factor in (a, b)), "the pair is rounded, too"
    start = layer.base_layer.weight.double() + method.scaling * b @ a
    difference = (start - whole["blocks.0.up_proj"]).abs().max().item()
    # One half of the last of 8 bits of the largest entry, and as much again of the pair's.
    assert 2**-12 < difference <= 2 * 2**-8 * whole["blocks.0.up_proj"].abs().max().item()


def test_the_start_is_the_best_approximation_whatever_the_pack() -> None:
    layer = nn.Linear(20, 14).double()
    weight = base_weight(layer)
    a, b = principal_pairs(weight, [(3, 2.0), (5, 0.5)])
    singular = torch.linalg.svdvals(layer.weight)
    for member, (rank, scaling) in enumerate([(3, 2.0), (5, 0.5)]):
        rest = torch.linalg.matrix_norm(layer.weight - scaling * b[member] @ a[member])
        assert rest.item() == pytest.approx(singular[rank:].square().sum().sqrt().item(), rel=1e-12)
        alone = principal_pairs(weight, [(rank, scaling)])
        assert torch.equal(alone[0][0], a[member, :rank])
        assert torch.equal(alone[1][0], b[member, :, :rank])
    assert (a.gather(2, a.abs().argmax(2, keepdim=True)) >= 0).all()


def test_the_pair_at_the_start_never_changes() -> None:
    run = PackRun(TinyModel(), [Member(method=small_method("pissa"))])
    before = held_by_layer(run)
    run.train(4)
    for layer, held in held_by_layer(run).items():
        assert torch.equal(held["initial_A"], before[layer]["lora_A"])
        assert torch.equal(held["initial_B"], before[layer]["lora_B"])
        assert not torch.equal(held["lora_A"], before[layer]["lora_A"])


def test_a_rank_above_the_singular_values_is_refused() -> None:
    layers = adaptable_layers(TinyModel())
    with pytest.raises(ValueError, match=r"pissa.rank: 7 is not allowed; allowed: 1 to 6: blocks\.0\.q_proj has no"):
        small_method("pissa", rank=7).target_layers(layers)
    assert small_method("pissa", rank=7, target_modules=("up_proj",)).target_layers(layers)
