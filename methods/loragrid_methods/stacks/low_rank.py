"""Low-rank updates: stacks declare factors and scalings, and this module multiplies them, forward and backward.

No other module multiplies by members' factors, or knows how rows, members and factors are laid out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loragrid_methods.stacks.base_weight import BaseWeight


@dataclass(frozen=True, kw_only=True)
class FixedPair:
    """A pair of factors that never trains: down (M, r, d_in), up (M, d_out, r), scaling (M, 1, 1) of its product."""

    down: Tensor
    up: Tensor
    scaling: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LowRankTerm:
    """The update of a low-rank stack: outer * [ (scaling * inner * (x A^T)) B^T ], plus the term of a fixed pair.

    Shapes, with M members and r the largest rank:
        down: A (M, r, d_in), or (r, d_in) if all members share it
        up: B (M, d_out, r), or (d_out, r)
        scaling (M, 1, 1), inner (M, r), outer (M, d_out): None means 1

    A tensor trains if it requires a gradient: parameters do, buffers do not.
    gradient_scaling (M, 1, 1): replaces `scaling` in the gradients of A and B (Delta-LoRA, whose output contains B A
    with a larger factor than that of its trained term).
    fixed: a second pair with its own scaling, whose term is added (Delta-LoRA's reference).
    origin: a pair (A0, B0) with the ranks of A and B, whose product is subtracted: s (B A - B0 A0) (PiSSA's start). The
    update is computed as s [ (x (A - A0)^T) B^T + (x A0^T) (B - B0)^T ], which is exactly zero at the origin and free
    of cancellation in every number format. The difference of two products would lose digits in bfloat16.
    A term with `inner` or `outer` has neither `fixed` nor `origin`.
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
    """||W_i + s B_i A|| of every row and member: row_norms ||W_i|| (d_out,) -> (M, d_out), in their dtype.

    It is computed as the root of ||W_i||^2 + 2 s B_i . (A W_i^T) + s^2 B_i (A A^T) B_i^T, without another weight of W's
    size. If B is zero, the result equals `row_norms` to the bit. A W^T costs as much as the base layer on r rows per
    member. The term must have a scaling, and neither vectors nor pairs.
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
    """Computes a `LowRankTerm`; backward keeps only the tensors that the gradients need.

    With z = x A^T, f = scaling * inner, g' = g * outer and h = g' B the gradients are
        dx = (f h) A (and the same of a second pair), dA = gradient_scaling inner (h^T x),
        dB = gradient_scaling g'^T (inner z), dinner = scaling sum_t h z, douter = rowsum((g^T (f z)) B)
    If `gradient_scaling` is None, it equals `scaling` (compilers do not accept the same tensor twice). A second pair
    (C, D) without a `fixed_scaling` is the origin. Besides the factors, backward keeps x only if A trains, z only if B
    or a vector trains, and never a product of the output's width. Products are computed in x's dtype; a float32 A on a
    bfloat16 base is rounded here, so no float32 copy of x is ever made. Two pairs are multiplied as one pair of their
    summed rank, which reads x and writes y once.
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
        """x (M, T, in) -> (M, T, out); the other shapes as in `LowRankTerm`, those of c and d as of a and b."""
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
    @once_differentiable  # a second backward would treat z as a constant and be silently wrong
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
    """The factor of x: A, [A; C], or [A - C; C] if C is the origin."""
    if c is None:
        return a.to(dtype)
    return torch.cat([(a - c if from_origin else a).to(dtype), c.to(dtype)], 1)


def _up(b: Tensor, d: Tensor | None, from_origin: bool, dtype: torch.dtype) -> Tensor:
    """The factor of the product with `_down`: B, [B, D], or [B, B - D] if D is the origin."""
    if d is None:
        return b.to(dtype)
    return torch.cat([b.to(dtype), (b - d if from_origin else d).to(dtype)], 2)


def _factors(
    a: Tensor, scaling: Tensor | None, inner: Tensor | None, c: Tensor | None, fixed_scaling: Tensor | None
) -> Tensor | None:
    """The factors of the columns of z: (M, 1, 1), (M, 1, r), or (M, 1, r of both pairs); None means 1."""
    if inner is not None:
        vector = inner.unsqueeze(1)
        return vector if scaling is None else scaling * vector
    if scaling is None or c is None or fixed_scaling is None:
        return scaling
    return torch.cat([scaling.expand(-1, -1, a.shape[1]), fixed_scaling.expand(-1, -1, c.shape[1])], 2)


def _times(tensor: Tensor, factors: Tensor | None) -> Tensor:
    """The product in the dtype of `tensor`; `factors` None means 1."""
    return tensor if factors is None else tensor * factors.to(tensor.dtype)
