"""The low-rank update with a backward that keeps only what the maths needs, and the draws of its factors."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loragrid_methods.stacks.adapter_stack import DrawClock


class LowRankUpdate(torch.autograd.Function):
    """y = scaling (x A^T) B^T for M members, with z = x A^T; with a fixed second pair also + fixed_scaling (x C^T) D^T.

    With u = g B the gradients are dx = scaling u A (+ fixed_scaling (g D) C), dA = gradient_scaling u^T x,
    dB = gradient_scaling g^T z; `gradient_scaling` None is `scaling` (no compiler takes the same tensor twice).
    Kept for backward besides the factors: x only where A trains, z only where B trains. The product is computed in
    the type of x; a float32 A under a bfloat16 base is rounded here, so no float32 copy of x is ever made. Both pairs
    are multiplied as one of the rank of both, which reads x and writes y once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
        gradient_scaling: Tensor | None,
        c: Tensor | None,
        d: Tensor | None,
        fixed_scaling: Tensor | None,
    ) -> Tensor:
        """x (M, T, in), a and c (M, r, in), b and d (M, out, r), all scalings (M, 1, 1) -> (M, T, out)."""
        down, up, factors = _both(a, c, 1, x.dtype), _both(b, d, 2, x.dtype), _factors(a, scaling, c, fixed_scaling)
        z = x @ down.mT
        trains_a, trains_b = ctx.needs_input_grad[1:3]
        own_z = z if c is None else z[..., : a.shape[1]].contiguous()
        ctx.save_for_backward(
            x if trains_a else None, own_z if trains_b else None, a, b, scaling, gradient_scaling, c, d, fixed_scaling
        )
        return (z * factors.to(x.dtype)) @ up.mT

    @staticmethod
    @once_differentiable  # z is a constant to a second backward, which would be wrong without a word
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g (M, T, out) -> gradients in the shapes of x, a and b."""
        x, z, a, b, scaling, gradient_scaling, c, d, fixed_scaling = ctx.saved_tensors
        gradient_scaling = scaling if gradient_scaling is None else gradient_scaling
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        grad_x = grad_a = grad_b = None
        if need_x or need_a:
            u = g @ (_both(b, d, 2, g.dtype) if need_x else b.to(g.dtype))
            if need_x:
                grad_x = (u * _factors(a, scaling, c, fixed_scaling).to(g.dtype)) @ _both(a, c, 1, g.dtype)
            if need_a:
                grad_a = (u[..., : a.shape[1]].mT @ x).to(a.dtype) * gradient_scaling.to(a.dtype)
        if need_b:
            grad_b = (g.mT @ z).to(b.dtype) * gradient_scaling.to(b.dtype)
        return grad_x, grad_a, grad_b, None, None, None, None, None


def _both(trained: Tensor, fixed: Tensor | None, rank_axis: int, dtype: torch.dtype) -> Tensor:
    """The factors side by side along their ranks."""
    return trained.to(dtype) if fixed is None else torch.cat([trained.to(dtype), fixed.to(dtype)], rank_axis)


def _factors(a: Tensor, scaling: Tensor, c: Tensor | None, fixed_scaling: Tensor | None) -> Tensor:
    """What every column of z is multiplied with: (M, 1, 1), or (M, 1, r of both)."""
    if c is None or fixed_scaling is None:
        return scaling
    return torch.cat([scaling.expand(-1, -1, a.shape[1]), fixed_scaling.expand(-1, -1, c.shape[1])], 2)


def low_rank_update(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: Tensor,
    gradient_scaling: Tensor | None = None,
    fixed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """`LowRankUpdate`; the gradients' scaling is the output's unless given, `fixed` is (C, D, their scaling)."""
    c, d, fixed_scaling = fixed or (None, None, None)
    update: Tensor = LowRankUpdate.apply(x, a, b, scaling, gradient_scaling, c, d, fixed_scaling)  # type: ignore[no-untyped-call]
    return update


def rank_class(rank: int) -> int:
    """16, 64, 256, ...: the first that is at least `rank`. Members of one class share stacks.

    A stack pads its members to its largest rank. Sharing saves kernels, padding costs arithmetic and optimizer memory:
    up to 16, the width of a matrix unit's tile, padding is as good as free; a member of rank 4 must not be padded to
    another's 256.
    """
    power = 16
    while power < rank:
        power *= 4
    return power


def draw_lora_A(seeds: Sequence[int], ranks: Sequence[int], layer: str, in_features: int) -> Tensor:
    """Each member's A ~ U(-1/sqrt(in), 1/sqrt(in)), zero-padded to the largest rank: (M, r_max, in) float32.

    The bound is Kaiming's with a = sqrt(5), as in the authors' loralib and PEFT. The draw depends on the seed and the
    layer alone: members of one seed start from the same A, whatever their method.
    """
    bound = 1.0 / math.sqrt(in_features)
    stacked = torch.zeros(len(seeds), max(ranks), in_features)
    for member, (seed, rank) in enumerate(zip(seeds, ranks, strict=True)):
        generator = torch.Generator().manual_seed(stable_seed(seed, layer, "lora_A"))
        stacked[member, :rank].uniform_(-bound, bound, generator=generator)
    return stacked


def member_dropout(x: Tensor, probability: float, seeds: Sequence[int], layer: str, clock: DrawClock) -> Tensor:
    """Dropout whose mask depends on the member's seed, the layer and the clock alone; x (M, T, d)."""
    masks = []
    # The first micro batch draws as the only one does.
    micro_batch = [clock.micro_batch] if clock.micro_batch else []
    for seed in seeds:
        generator = torch.Generator(device=x.device)
        generator.manual_seed(stable_seed(seed, layer, "dropout", clock.step, clock.worker, *micro_batch))
        masks.append(torch.rand(x.shape[1:], generator=generator, device=x.device) >= probability)
    return x * (torch.stack(masks).to(x.dtype) / (1.0 - probability))


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from its parts, the same in every process and on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
