"""The hand-written backward passes are the true derivatives, for every combination of inputs that need a gradient."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loragrid_methods.stacks.low_rank import FixedPair, LowRankTerm
from loragrid_methods.stacks.low_rank import low_rank_update as update_of

SOME_OF_THREE = [needs for needs in itertools.product([False, True], repeat=3) if any(needs)]


def draw(*shape: int, needs_grad: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(needs_grad)


def low_rank_inputs(needs: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """x (2, 5, 4), A (2, 3, 4), B (2, 6, 3)."""
    x, a, b = needs
    return draw(2, 5, 4, needs_grad=x), draw(2, 3, 4, needs_grad=a), draw(2, 6, 3, needs_grad=b)


def vera_inputs(needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """x (2, 5, 4), A (3, 4), B (6, 3), d (2, 3), b (2, 6); A and B never need a gradient."""
    return (
        draw(2, 5, 4, needs_grad=needs[0]),
        draw(3, 4),
        draw(6, 3),
        draw(2, 3, needs_grad=needs[1]),
        draw(2, 6, needs_grad=needs[2]),
    )


def low_rank_update(x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, gradient_scaling: Tensor | None = None) -> Tensor:
    return update_of(x, LowRankTerm(down=a, up=b, scaling=scaling, gradient_scaling=gradient_scaling))


def apply_vera(x: Tensor, a: Tensor, b: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    return update_of(x, LowRankTerm(down=a, up=b, inner=lambda_d, outer=lambda_b))


def plain_vera(x: Tensor, a: Tensor, b: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    return lambda_b.unsqueeze(1) * ((lambda_d.unsqueeze(1) * (x @ a.mT)) @ b.mT)


@pytest.mark.parametrize("needs", SOME_OF_THREE, ids=str)
def test_low_rank_update_has_the_derivatives_of_its_output(needs: tuple[bool, ...]) -> None:
    scaling = torch.tensor([2.0, -0.7], dtype=torch.float64).view(2, 1, 1)
    inputs = low_rank_inputs(needs)
    plain = scaling * ((inputs[0] @ inputs[1].mT) @ inputs[2].mT)
    assert (low_rank_update(*inputs, scaling) - plain).abs().max().item() <= 1e-14
    assert torch.autograd.gradcheck(lambda x, a, b: low_rank_update(x, a, b, scaling), inputs)


@pytest.mark.parametrize("needs", SOME_OF_THREE, ids=str)
def test_vera_update_has_the_derivatives_of_its_output(needs: tuple[bool, ...]) -> None:
    inputs = vera_inputs(needs)
    assert (apply_vera(*inputs) - plain_vera(*inputs)).abs().max().item() <= 1e-14
    assert torch.autograd.gradcheck(apply_vera, inputs)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5))[1:], ids=str)
def test_a_term_in_which_everything_trains_has_its_derivatives(needs: tuple[bool, ...], scaled: bool) -> None:
    """x, A, B and both vectors, with and without a scaling: no method declares all of it yet."""
    x, a, b = low_rank_inputs(needs[:3])
    inner, outer = draw(2, 3, needs_grad=needs[3]), draw(2, 6, needs_grad=needs[4])
    scaling = torch.tensor([2.0, -0.7], dtype=torch.float64).view(2, 1, 1) if scaled else None

    def ours(x: Tensor, a: Tensor, b: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        return update_of(x, LowRankTerm(down=a, up=b, scaling=scaling, inner=inner, outer=outer))

    inputs = (x, a, b, inner, outer)
    plain = outer.unsqueeze(1) * ((inner.unsqueeze(1) * (x @ a.mT)) @ b.mT) * (1.0 if scaling is None else scaling)
    assert (ours(*inputs) - plain).abs().max().item() <= 1e-13
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("kind", ["fixed", "origin"])
@pytest.mark.parametrize("needs", SOME_OF_THREE, ids=str)
def test_a_term_with_a_second_pair_has_its_derivatives(needs: tuple[bool, ...], kind: str) -> None:
    scaling = torch.tensor([2.0, -0.7], dtype=torch.float64).view(2, 1, 1)
    other = torch.tensor([0.4, 3.0], dtype=torch.float64).view(2, 1, 1)
    inputs = low_rank_inputs(needs)
    rank = {"fixed": 5, "origin": 3}[kind]
    c, d = draw(2, rank, 4, seed=1), draw(2, 6, rank, seed=1)
    pair = FixedPair(down=c, up=d, scaling=other if kind == "fixed" else None)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        fixed, origin = (pair, None) if kind == "fixed" else (None, pair)
        return update_of(x, LowRankTerm(down=a, up=b, scaling=scaling, fixed=fixed, origin=origin))

    second = other if kind == "fixed" else -scaling
    plain = scaling * ((inputs[0] @ inputs[1].mT) @ inputs[2].mT) + second * ((inputs[0] @ c.mT) @ d.mT)
    assert (ours(*inputs) - plain).abs().max().item() <= 1e-13
    assert torch.autograd.gradcheck(ours, inputs)


def test_an_update_from_an_origin_keeps_the_digits_of_bfloat16() -> None:
    x = draw(2, 5, 4, dtype=torch.bfloat16)
    a, b = draw(2, 3, 4, dtype=torch.float32), draw(2, 6, 3, dtype=torch.float32)
    scaling, origin = torch.ones(2, 1, 1), FixedPair(down=a, up=b)
    assert update_of(x, LowRankTerm(down=a, up=b, scaling=scaling, origin=origin)).count_nonzero() == 0
    moved_a, moved_b = a + 1e-4 * draw(2, 3, 4, seed=2).float(), b + 1e-4 * draw(2, 6, 3, seed=2).float()
    ours = update_of(x, LowRankTerm(down=moved_a, up=moved_b, scaling=scaling, origin=origin)).double()
    exact = x.double() @ (moved_b.double() @ moved_a.double() - b.double() @ a.double()).mT
    # bfloat16 keeps 8 bits, two products in a row. The two products' own difference has no right digit here.
    assert (ours - exact).abs().max().item() <= 0.02 * exact.abs().max().item()
    apart = FixedPair(down=a, up=b, scaling=-scaling)
    rounded = update_of(x, LowRankTerm(down=moved_a, up=moved_b, scaling=scaling, fixed=apart)).double()
    assert (rounded - exact).abs().max().item() > 0.5 * exact.abs().max().item()


def test_gradient_scaling_changes_only_the_gradients_of_the_factors() -> None:
    scaling = torch.tensor([2.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    of_gradients = torch.tensor([0.5, 9.0], dtype=torch.float64).view(2, 1, 1)
    inputs, g = low_rank_inputs((True, True, True)), draw(2, 5, 6, seed=1)
    plain = torch.autograd.grad(low_rank_update(*inputs, scaling), inputs, g)
    update = low_rank_update(*inputs, scaling, gradient_scaling=of_gradients)
    assert torch.equal(update, low_rank_update(*inputs, scaling))
    ours = torch.autograd.grad(update, inputs, g)
    assert torch.equal(ours[0], plain[0])
    for gradient, unscaled in zip(ours[1:], plain[1:], strict=True):
        assert (gradient - unscaled * of_gradients / scaling).abs().max().item() <= 1e-13


@pytest.mark.parametrize(
    ("update", "inputs"),
    [
        (lambda x, a, b: low_rank_update(x, a, b, torch.ones(2, 1, 1)), low_rank_inputs((True, True, True))),
        (apply_vera, vera_inputs((True, True, True))),
    ],
    ids=["low_rank", "vera"],
)
def test_a_second_derivative_is_refused_instead_of_being_wrong(
    update: Callable[..., Tensor], inputs: tuple[Any, ...]
) -> None:
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = torch.autograd.grad(update(*inputs).square().sum(), trained, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward(retain_graph=True)


def test_float32_factors_under_a_bfloat16_input_get_float32_gradients() -> None:
    x = draw(2, 5, 4, dtype=torch.bfloat16, needs_grad=True)
    a, b = draw(2, 3, 4, dtype=torch.float32, needs_grad=True), draw(2, 6, 3, dtype=torch.float32, needs_grad=True)
    scaling = torch.full((2, 1, 1), 0.3)
    update = low_rank_update(x, a, b, scaling)
    exact_inputs = tuple(tensor.detach().double().requires_grad_() for tensor in (x, a, b))
    exact = scaling.double() * ((exact_inputs[0] @ exact_inputs[1].mT) @ exact_inputs[2].mT)
    assert update.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; two products in a row.
    assert (update - exact).abs().max().item() <= 0.02 * exact.abs().max().item()
    gradients = torch.autograd.grad(update, (x, a, b), torch.ones_like(update))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, exact_inputs, torch.ones_like(exact)), strict=True):
        assert (ours - theirs).abs().max().item() <= 0.02 * theirs.abs().max().item()
