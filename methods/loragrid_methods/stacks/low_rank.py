"""Low-rank updates: a stack declares its factors and scales, and here they are multiplied, forward and backward.

The one place that multiplies by members' factors. How rows, members and factors are laid out is known here only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loragrid_methods.stacks.base_weight import BaseWeight


@dataclass(frozen=True, kw_only=True)
class FixedPair:
    """A pair of factors that never trains: down (M, r, d_in), up (M, d_out, r), and the scaling (M, 1, 1) of a term."""

    down: Tensor
    up: Tensor
    scaling: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LowRankTerm:
    """What a low-rank stack adds to its layer: outer * [ (scaling * inner * (x A^T)) B^T ], and a fixed pair beside it.

    Shapes, with M members and r the largest rank:
        down: A (M, r, d_in), or (r, d_in) where all members share it
        up: B (M, d_out, r), or (d_out, r)
        scaling (M, 1, 1), inner (M, r), outer (M, d_out): 1 where they are None

    What trains is what asks for a gradient: a parameter does, a buffer does not.
    gradient_scaling (M, 1, 1): the gradients of A and B take this in place of `scaling` (Delta-LoRA, whose output
    moves by more than its own term).
    fixed: a second pair with a scaling of its own, whose term is added (Delta-LoRA's reference).
    origin: the pair that the update is measured from, s (B A - B0 A0), of the ranks of A and B (PiSSA's start). It is
    computed as s [ (x (A - A0)^T) B^T + (x A0^T) (B - B0)^T ]: exactly zero at the origin and free of cancellation in
    every number format, where the difference of two products would lose a bfloat16's digits.
    A term with vectors has neither of the two pairs.
    """

    down: Tensor
    up: Tensor
    scaling: Tensor | None = None
    gradient_scaling: Tensor | None = None
    inner: Tensor | None = None
    outer: Tensor | None = None
    fixed: FixedPair | None = None
    origin: FixedPair | None = None


def low_rank_update(x: Tensor, term: LowRankTerm) -> Tensor:
    """The update of a term: x (M, T, d_in) -> (M, T, d_out)."""
    pair = term.fixed or term.origin
    assert term.fixed is None or term.origin is None
    assert pair is None or (term.inner is None and term.outer is None)
    update: Tensor = LowRankUpdate.apply(  # type: ignore[no-untyped-call]
        x,
        term.down,
        term.up,
        term.scaling,
        term.gradient_scaling,
        term.inner,
        term.outer,
        None if pair is None else pair.down,
        None if pair is None else pair.up,
        None if term.fixed is None else term.fixed.scaling,
    )
    return update


def times_vectors(rows: Tensor, vectors: Tensor) -> Tensor:
    """Every member's rows times its vector, in the type of the rows: (M, T, d), (M, d) -> (M, T, d)."""
    return rows * vectors.to(rows.dtype).unsqueeze(1)


@torch.no_grad()
def updated_row_norms(term: LowRankTerm, weight: BaseWeight, row_norms: Tensor) -> Tensor:
    """||W_i + s B_i A|| of every row and member: row_norms ||W_i|| (d_out,) -> (M, d_out), in their type.

    As the root of ||W_i||^2 + 2 s B_i . (A W_i^T) + s^2 B_i (A A^T) B_i^T: no weight of the size of W is made, and
    where B is zero the result has the bits of `row_norms`. A W^T costs as much as the base layer on r rows per member.
    Only for a term with scaling, without vectors and pairs.
    """
    assert term.scaling is not None
    assert not any(part is not None for part in (term.inner, term.outer, term.fixed, term.origin))
    down, up = term.down, term.up
    scaling = term.scaling.squeeze(2)
    with_weight = (up * weight.product(down).mT).sum(2)
    with_itself = ((up @ (down @ down.mT)) * up).sum(2)
    squares = row_norms.square() + scaling * (2.0 * with_weight + scaling * with_itself)
    return squares.clamp(min=0.0).sqrt()


class LowRankUpdate(torch.autograd.Function):
    """`LowRankTerm` with a backward that keeps only what the maths needs.

    With z = x A^T, f = scaling * inner, g' = g * outer and h = g' B the gradients are
        dx = (f h) A (and the same of a second pair), dA = gradient_scaling inner (h^T x),
        dB = gradient_scaling g'^T (inner z), dinner = scaling sum_t h z, douter = rowsum((g^T (f z)) B)
    `gradient_scaling` None is `scaling` (no compiler takes the same tensor twice). A second pair (C, D) without a
    `fixed_scaling` is the origin. Kept for backward besides the factors: x only where A trains, z only where B or a
    vector trains, never a product of the width of the output. Products are computed in the type of x; a float32 A
    under a bfloat16 base is rounded here, so no float32 copy of x is ever made. Two pairs are multiplied as one of the
    rank of both, which reads x and writes y once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor | None,
        gradient_scaling: Tensor | None,
        inner: Tensor | None,
        outer: Tensor | None,
        c: Tensor | None,
        d: Tensor | None,
        fixed_scaling: Tensor | None,
    ) -> Tensor:
        """x (M, T, in), c and d as a and b, shapes as in `LowRankTerm` -> (M, T, out)."""
        from_origin = fixed_scaling is None
        down, up = _down(a, c, from_origin, x.dtype), _up(b, d, from_origin, x.dtype)
        z = x @ down.mT
        trains_a, trains_z = ctx.needs_input_grad[1], any(ctx.needs_input_grad[i] for i in (2, 5, 6))
        own_z = z
        if c is not None:
            rank = a.shape[-2]
            own_z = z[..., :rank] + z[..., rank:] if from_origin else z[..., :rank].contiguous()
        ctx.save_for_backward(
            x if trains_a else None,
            own_z if trains_z else None,
            *(a, b, scaling, gradient_scaling, inner, outer, c, d, fixed_scaling),
        )
        y = _times(z, _factors(a, scaling, inner, c, fixed_scaling)) @ up.mT
        return y if outer is None else times_vectors(y, outer)

    @staticmethod
    @once_differentiable  # z is a constant to a second backward, which would be wrong without a word
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g (M, T, out) -> gradients in the shapes of x, a, b, inner and outer."""
        x, z, a, b, scaling, gradient_scaling, inner, outer, c, d, fixed_scaling = ctx.saved_tensors
        gradient_scaling = scaling if gradient_scaling is None else gradient_scaling
        need_x, need_a, need_b, _, _, need_inner, need_outer, *_ = ctx.needs_input_grad
        from_origin, rank = fixed_scaling is None, a.shape[-2]
        grad_x = grad_a = grad_b = grad_inner = grad_outer = None
        scaled_g = g if outer is None else times_vectors(g, outer)
        if need_x or need_a or need_inner:
            h = scaled_g @ (_up(b, d, from_origin, g.dtype) if need_x else b.to(g.dtype))
            if need_x:
                factors = _factors(a, scaling, inner, c, fixed_scaling)
                grad_x = _times(h, factors) @ _down(a, c, from_origin, g.dtype)
            own_h = h[..., :rank]
            if need_a:
                grad_a = _times((own_h.mT @ x).to(a.dtype), gradient_scaling)
                grad_a = _times(grad_a, None if inner is None else inner.unsqueeze(2))
            if need_inner:
                grad_inner = (own_h * z).to(inner.dtype).sum(1)
                grad_inner = _times(grad_inner, None if scaling is None else scaling.squeeze(2))
        if need_b:
            inner_z = _times(z, None if inner is None else inner.unsqueeze(1))
            grad_b = _times((scaled_g.mT @ inner_z).to(b.dtype), gradient_scaling)
        if need_outer:
            factored_z = _times(z, _factors(a, scaling, inner, None, None))
            grad_outer = ((g.mT @ factored_z).to(outer.dtype) * b.to(outer.dtype)).sum(2)
        return grad_x, grad_a, grad_b, None, None, grad_inner, grad_outer, None, None, None


def _down(a: Tensor, c: Tensor | None, from_origin: bool, dtype: torch.dtype) -> Tensor:
    """What x is multiplied with: A, [A; C], or [A - C; C] from the origin C."""
    if c is None:
        return a.to(dtype)
    return torch.cat([(a - c if from_origin else a).to(dtype), c.to(dtype)], 1)


def _up(b: Tensor, d: Tensor | None, from_origin: bool, dtype: torch.dtype) -> Tensor:
    """What the product with `_down` is multiplied with: B, [B, D], or [B, B - D] from the origin D."""
    if d is None:
        return b.to(dtype)
    return torch.cat([b.to(dtype), (b - d if from_origin else d).to(dtype)], 2)


def _factors(
    a: Tensor, scaling: Tensor | None, inner: Tensor | None, c: Tensor | None, fixed_scaling: Tensor | None
) -> Tensor | None:
    """What every column of z is multiplied with: (M, 1, 1), (M, 1, r), or (M, 1, r of both pairs); None for 1."""
    if inner is not None:
        vector = inner.unsqueeze(1)
        return vector if scaling is None else scaling * vector
    if scaling is None or c is None or fixed_scaling is None:
        return scaling
    return torch.cat([scaling.expand(-1, -1, a.shape[1]), fixed_scaling.expand(-1, -1, c.shape[1])], 2)


def _times(tensor: Tensor, factors: Tensor | None) -> Tensor:
    """The product in the type of `tensor`; `factors` None is 1."""
    return tensor if factors is None else tensor * factors.to(tensor.dtype)
