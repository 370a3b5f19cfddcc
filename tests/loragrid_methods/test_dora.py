"""DoRA equals PEFT's, computes row norms without a second weight, and starts exactly at the base in every dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from loragrid_methods.dora import DoRA, DoRAStack
from loragrid_methods.stacks.adapter_stack import per_member
from loragrid_methods.stacks.base_weight import BaseWeight, base_weight
from loragrid_methods.stacks.low_rank import LowRankTerm, updated_row_norms
from loragrid_methods.stacks.pack import AdapterPack
from loragrid_methods.stacks.targets import LayerShape
from tests.support.pack_training import Member, PackRun, TinyModel, small_method, token_ids
from tests.support.peft_reference import (
    adamw_of,
    assert_close,
    held_by_layer,
    peft_losses,
    randomise,
    targets_of,
)

NUM_STEPS = 20


def peft_dora(base: Any, run: PackRun) -> Any:
    """PEFT's model on `base` with the factors and magnitudes that the run's only member holds."""
    method: Any = run.members[0].method
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        use_rslora=method.rslora,
        use_dora=True,
        target_modules=list(method.target_modules),
        fan_in_fan_out=not isinstance(base, TinyModel),
    )
    model = get_peft_model(base, config).double()
    for name, held in held_by_layer(run).items():
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        magnitude = layer.lora_magnitude_vector["default"].weight.data
        assert_close(held["lora_magnitude_vector"], magnitude)  # both start as ||W||
        layer.lora_A["default"].weight.data.copy_(held["lora_A"])
        layer.lora_B["default"].weight.data.copy_(held["lora_B"])
    return model


def theirs_of(model: Any, layer: str) -> dict[str, Tensor]:
    """What PEFT trains in one layer, by our names."""
    module: Any = model.get_submodule(f"base_model.model.{layer}")
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    return {name: getattr(module, name)["default"].weight for name in names}


@pytest.mark.parametrize("fields", [{"alpha": 6.0}, {"alpha": 6.0, "rslora": True}], ids=["alpha/r", "alpha/sqrt(r)"])
def test_outputs_and_gradients_are_pefts(base_of: Callable[[], Any], fields: dict[str, Any]) -> None:
    base, reference = base_of(), base_of()
    run = PackRun(base, [Member(method=small_method("dora", target_modules=targets_of(base), **fields))])
    model = peft_dora(reference, run)
    randomise(run, "lora_B")
    for name, held in held_by_layer(run).items():
        theirs_of(model, name)["lora_B"].data.copy_(held["lora_B"])
    losses = peft_losses(model, reference, 0)
    losses.sum().backward()
    assert_close(run.backward(), losses.detach())
    ids = token_ids(reference, 0, 0)
    assert_close(base(input_ids=ids).logits, model(input_ids=ids).logits)
    for layer, stack in run.pack.member_stacks(0)[0].items():
        theirs = theirs_of(model, layer)
        for name, parameter in stack.named_parameters():
            assert parameter.grad is not None
            gradient = theirs[name].grad
            assert gradient is not None
            assert_close(parameter.grad[0], gradient)


def test_twenty_steps_of_adamw_are_pefts(base_of: Callable[[], Any]) -> None:
    base, reference = base_of(), base_of()
    method = small_method("dora", target_modules=targets_of(base))
    run = PackRun(base, [Member(method=method, lr=0.01, weight_decay=0.1)], schedule=lambda step: 1.0)
    model = peft_dora(reference, run)
    optimizer = adamw_of(model, lr=0.01, weight_decay=0.1)
    for step in range(NUM_STEPS):
        losses = peft_losses(model, reference, step)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        assert_close(run.step(), losses.detach(), tolerance=1e-10)
    for layer, held in held_by_layer(run).items():
        for name, tensor in theirs_of(model, layer).items():
            assert_close(held[name], tensor.detach(), tolerance=1e-8)


def norms_of(dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    """Row norms of W + s B A for two members, ours in `dtype` (float32 for a bfloat16 W) and exactly."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(96, 40).to(dtype).requires_grad_(False)
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 96), (2, 40, 5)))
    adapters = torch.promote_types(dtype, torch.float32)
    a, b = a.to(adapters), (scale * b).to(adapters)
    weight, scaling = base_weight(layer), per_member([2.0, 0.5])
    term = LowRankTerm(down=a, up=b, scaling=scaling.to(adapters))
    ours = updated_row_norms(term, weight, weight.row_norms().to(adapters))
    exact = torch.linalg.vector_norm(layer.weight.double() + scaling * (b.double() @ a.double()), dim=2)
    return ours, exact


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)], ids=str
)
def test_row_norms_equal_those_of_the_weight_never_made(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    ours, exact = norms_of(dtype, scale)
    assert (ours / exact - 1).abs().max().item() <= tolerance


def test_row_norms_survive_an_update_that_nearly_cancels_a_row() -> None:
    """The sum of three terms cancels: of a norm a hundred times smaller than its row's, float32 keeps three digits."""
    layer = nn.Linear(8, 3).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(24.0).view(3, 8) + 1)
    a = layer.weight[1:2].clone().unsqueeze(0)
    b = torch.tensor([[[0.0], [-0.99], [0.0]]])
    weight = base_weight(layer)
    term = LowRankTerm(down=a, up=b, scaling=torch.ones(1, 1, 1))
    ours = updated_row_norms(term, weight, weight.row_norms().float())
    exact = torch.linalg.vector_norm(layer.weight.double() + b[0].double() @ a[0].double(), dim=1)
    assert (ours / exact - 1).abs().max().item() <= 2e-3
    assert ours[0, 1] < 0.02 * weight.row_norms()[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attach_changes_no_bit_of_the_output(dtype: torch.dtype) -> None:
    base, ids = TinyModel(dtype), token_ids(TinyModel(), 0, 0)
    before = base(input_ids=ids).logits
    AdapterPack(base, [(small_method("dora"), 0)], output_layer=base.head)
    assert torch.equal(base(input_ids=ids).logits, before)


def test_a_row_of_zeros_stays_zero_and_everything_finite() -> None:
    base, names = TinyModel(), ("blocks.0.q_proj", "blocks.1.up_proj")
    with torch.no_grad():
        for name in names:
            base.get_parameter(f"{name}.weight")[3] = 0.0
    run = PackRun(base, [Member(method=small_method("dora"))])
    assert run.train(5).isfinite().all()
    held = held_by_layer(run)
    assert all(tensor.isfinite().all() for tensors in held.values() for tensor in tensors.values())
    for name in names:
        assert held[name]["lora_magnitude_vector"][3] == 0.0
        assert held[name]["lora_B"][3].count_nonzero() == 0


def test_backward_keeps_one_more_output_than_lora() -> None:
    def saved(name: str) -> int:
        base = nn.Sequential(nn.Linear(48, 40)).double()
        pack = AdapterPack(base, [(small_method(name), 0)], dtype=torch.float64)
        pack.train()
        own = {tensor.untyped_storage().data_ptr() for tensor in (*base.parameters(), *base.buffers())}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = base(torch.randn(1, 64, 48, dtype=torch.float64, requires_grad=True))
        assert output.requires_grad
        return sum(kept.values())

    # Beside it two vectors: the norms, and what the output is multiplied with.
    assert saved("dora") - saved("lora") == 8 * (64 * 40 + 2 * 40)


def test_norms_cost_r_rows_of_the_base_product_per_member() -> None:
    def operations(name: str) -> int:
        base = nn.Sequential(nn.Linear(48, 40))
        pack = AdapterPack(base, [(small_method(name), seed) for seed in range(3)])
        pack.train()
        with FlopCounterMode(display=False) as counter:
            base(torch.randn(3, 64, 48))
        return int(counter.get_total_flops())

    members, rank = 3, 4
    product = 2 * members * rank * 48 * 40
    with_itself = 2 * members * (rank * rank * 48 + 40 * rank * rank)
    assert operations("dora") - operations("lora") == product + with_itself


class Int8Weight(BaseWeight):
    """A weight that the layer stores in eight bits with one scale: all that a stack may ask for is the interface."""

    def __init__(self, whole: Tensor) -> None:
        self.scale = whole.abs().max() / 127
        self.stored = (whole / self.scale).round().to(torch.int8)

    shape, dtype, device = (14, 20), torch.float64, torch.device("cpu")
    bias = None

    def dense(self) -> Tensor:
        return self.stored.to(self.dtype) * self.scale


def test_a_weight_stored_in_another_way_only_answers_the_interface() -> None:
    weight = Int8Weight(nn.Linear(20, 14).double().weight.detach())
    shape, method = LayerShape(name="layer", in_features=20, out_features=14), DoRA(rank=3)
    stack = DoRAStack([method], [0], shape, weight).double()
    with torch.no_grad():
        stack.lora_B.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(1, 5, 20, dtype=torch.float64)
        y = x @ weight.dense().mT
        updated = weight.dense() + method.scaling * stack.lora_B[0] @ stack.lora_A[0]
        directions = updated / torch.linalg.vector_norm(updated, dim=1, keepdim=True)
        expected = x @ (stack.lora_magnitude_vector[0].unsqueeze(1) * directions).mT
        assert_close(y + stack.forward_with_base(x, y, weight), expected)
