"""Delta-LoRA never writes W, and equals the paper's loop, which writes W after every step."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loragrid_methods.delta_lora import DeltaLoRA
from tests.support.pack_training import (
    LINEAR_LAYERS,
    Member,
    PackRun,
    TinyModel,
    decay_slowly,
    largest_difference,
    next_token_losses,
    small_method,
    token_ids,
)

NUM_STEPS, START_STEP = 120, 30
LR, WEIGHT_DECAY, CLIP_NORM = 0.01, 0.1, 0.3
METHOD = DeltaLoRA(rank=3, alpha=4.0, delta_scale=0.7, start_step=START_STEP)


class ExplicitLayer(nn.Module):
    """y = x W^T + s (x A^T) B^T with W a constant to autograd that `write` changes."""

    def __init__(self, linear: nn.Linear, a: Tensor, scaling: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach().clone(), linear.bias
        self.lora_A = nn.Parameter(a.clone())
        self.lora_B = nn.Parameter(a.new_zeros(len(self.weight), len(a)))
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def product(self) -> Tensor:
        """s B A as it stands."""
        return self.scaling * (self.lora_B.detach() @ self.lora_A.detach())


def train_explicitly(method: DeltaLoRA, start_step: int) -> tuple[list[float], dict[str, Tensor]]:
    """The paper's loop, in which W is written after the optimizer step of every t > K: losses, and A, B, W by layer."""
    run = PackRun(TinyModel(), [Member(method=method)])
    draws = {name: stack.state_dict()["lora_A"][0] for name, stack in run.pack.member_stacks(0)[0].items()}
    model = TinyModel().requires_grad_(False)
    layers = {}
    for name, a in draws.items():
        layers[name] = ExplicitLayer(model.get_submodule(name), a, method.scaling)  # type: ignore[arg-type]
        model.set_submodule(name, layers[name])
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, foreach=False)
    losses = []
    for t in range(NUM_STEPS):
        ids = token_ids(model, 0, t)
        loss = next_token_losses(model(ids).logits, ids, 1).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = LR * decay_slowly(t)
        before = {name: layer.product() for name, layer in layers.items()}
        optimizer.step()
        if t > start_step:
            for name, layer in layers.items():
                layer.weight += method.delta_scale * (layer.product() - before[name])
        losses.append(loss.item())
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.lora_A": layer.lora_A.detach(), f"{name}.lora_B": layer.lora_B.detach()}
        tensors[f"{name}.W"] = layer.weight
    return losses, tensors


def train_telescoped(method: DeltaLoRA) -> tuple[list[float], dict[str, Tensor]]:
    """The same with the package's own form; W = W_0 + lambda s (B A - B_ref A_ref)."""
    member = Member(method=method, lr=LR, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
    run = PackRun(TinyModel(), [member])
    losses = run.train(NUM_STEPS)[:, 0].tolist()
    held = run.member_tensors(0)
    tensors: dict[str, Tensor] = {}
    for name, layer in run.pack.adapted.items():
        a, b = held[f"{name}.lora_A"], held[f"{name}.lora_B"]
        moved = b @ a - held[f"{name}.reference_B"] @ held[f"{name}.reference_A"]
        tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        start = layer.base_layer.get_parameter("weight").detach()
        tensors[f"{name}.W"] = start + method.delta_scale * method.scaling * moved
    return losses, tensors


def test_the_telescoped_form_is_the_papers_loop_over_120_steps() -> None:
    losses, tensors = train_telescoped(METHOD)
    oracle_losses, oracle = train_explicitly(METHOD, START_STEP)
    assert len(oracle) == 3 * 2 * len(LINEAR_LAYERS)
    assert max(abs(a - b) for a, b in zip(losses, oracle_losses, strict=True)) <= 1e-12
    assert largest_difference(tensors, oracle) <= 1e-12
    start = TinyModel()
    for name in oracle:
        if name.endswith(".W"):
            weight = start.get_parameter(f"{name.removesuffix('.W')}.weight")
            assert (oracle[name] - weight).abs().max().item() > 1e-2, name


@pytest.mark.parametrize("start_step", [START_STEP - 1, START_STEP + 1])
def test_the_papers_loop_with_K_off_by_one_trains_differently(start_step: int) -> None:
    losses, tensors = train_telescoped(METHOD)
    oracle_losses, oracle = train_explicitly(METHOD, start_step)
    agree = [abs(a - b) <= 1e-12 for a, b in zip(losses, oracle_losses, strict=True)]
    # W is first written by the step min(K, K') + 1, so the loss differs from the next one on.
    first_difference = min(start_step, START_STEP) + 2
    assert all(agree[:first_difference])
    assert not any(agree[first_difference:])
    assert largest_difference(tensors, oracle) > 1e-4


def test_delta_lora_that_never_starts_is_lora_to_the_bit() -> None:
    delta = PackRun(TinyModel(), [Member(method=small_method("delta_lora", start_step=8))])
    lora = PackRun(TinyModel(), [Member(method=small_method("lora"))])
    assert torch.equal(delta.train(8), lora.train(8))


def test_lambda_zero_is_lora_before_and_after_the_start() -> None:
    methods = [small_method("delta_lora", delta_scale=0.0, start_step=2), small_method("lora")]
    delta, lora = (PackRun(TinyModel(), [Member(method=m, weight_decay=0.1, clip_norm=0.3)]) for m in methods)
    assert (delta.train(12) - lora.train(12)).abs().max().item() <= 1e-14
    held, expected = delta.member_tensors(0), lora.member_tensors(0)
    assert largest_difference({name: held[name] for name in expected}, expected) <= 1e-13
    assert all(tensor.item() == 1 for name, tensor in held.items() if name.endswith("started"))


def test_factors_get_loras_gradients_and_x_gets_the_whole_weights() -> None:
    """One stack after its snapshot against the formula in plain autograd, W detached as a constant."""
    method = small_method("delta_lora", rank=2, alpha=6.0, delta_scale=1.5)
    run = PackRun(TinyModel(), [Member(method=method)])
    run.train(5)
    stack = copy.deepcopy(run.pack.member_stacks(0)[0]["blocks.0.up_proj"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(1, 7, 20, generator=generator, dtype=torch.float64)
    a, b = (stack.get_parameter(name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B"))
    reference = stack.get_buffer("reference_B") @ stack.get_buffer("reference_A")
    constant = 1.5 * 3.0 * (b @ a - reference).detach()
    expected = 3.0 * ((x @ a.mT) @ b.mT) + x @ constant.mT
    x_ours = x.detach().clone().requires_grad_()
    ours = stack(x_ours)
    assert (ours - expected).abs().max().item() <= 1e-14
    expected_gradients = torch.autograd.grad(expected, (x, a, b), g)
    parameters = (x_ours, stack.get_parameter("lora_A"), stack.get_parameter("lora_B"))
    for gradient, reference_gradient in zip(torch.autograd.grad(ours, parameters, g), expected_gradients, strict=True):
        assert (gradient - reference_gradient).abs().max().item() <= 1e-13


def test_the_snapshot_is_taken_once_after_K_plus_one_steps() -> None:
    run = PackRun(TinyModel(), [Member(method=small_method("delta_lora", start_step=2))])
    history = []
    for _ in range(6):
        run.step()
        history.append(run.member_tensors(0))
    name = "blocks.1.down_proj"
    assert [held[f"{name}.started"].item() for held in history] == [0, 0, 1, 1, 1, 1]
    for held in history[2:]:
        assert torch.equal(held[f"{name}.reference_A"], history[2][f"{name}.lora_A"])
        assert torch.equal(held[f"{name}.reference_B"], history[2][f"{name}.lora_B"])
    assert not torch.equal(history[3][f"{name}.lora_B"], history[2][f"{name}.lora_B"])


def test_a_start_so_late_that_W_never_moves_is_refused() -> None:
    """The latest start that is accepted is the latest with which W has moved at the end."""
    for start_step, moves in ((2, True), (3, False)):
        method = small_method("delta_lora", start_step=start_step)
        run = PackRun(TinyModel(), [Member(method=method)])
        run.train(4)
        held = run.member_tensors(0)
        name = "blocks.0.q_proj"
        product = held[f"{name}.lora_B"] @ held[f"{name}.lora_A"]
        moved = held[f"{name}.started"] * (product - held[f"{name}.reference_B"] @ held[f"{name}.reference_A"])
        assert bool(moved.count_nonzero()) == moves
        if moves:
            method.check_steps(4)
        else:
            with pytest.raises(ValueError, match=r"delta_lora\.start_step: 3 is not allowed; allowed: 0 to 2 with 4"):
                method.check_steps(4)


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 0), ("alpha", math.nan), ("delta_scale", -1.0), ("start_step", -1)]
)
def test_impossible_hyperparameters_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"delta_lora\.{field}: {value!r}"):
        small_method("delta_lora", **{field: value})
