"""Random draws that depend on a member's seed and its layer, never on the other members of its pack."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loragrid_methods.stacks.adapter_stack import DrawClock


def draw_lora_A(seeds: Sequence[int], ranks: Sequence[int], layer: str, in_features: int) -> Tensor:
    """Each member's A ~ U(-1/sqrt(in), 1/sqrt(in)), zero-padded to the largest rank: (M, r_max, in) float32.

    The bound is Kaiming's with a = sqrt(5), as in the authors' loralib and PEFT. The draw depends only on
    the seed and the layer: members with the same seed start from the same A, whatever their method.
    """
    bound = 1.0 / math.sqrt(in_features)
    stacked = torch.zeros(len(seeds), max(ranks), in_features)
    for member, (seed, rank) in enumerate(zip(seeds, ranks, strict=True)):
        generator = torch.Generator().manual_seed(stable_seed(seed, layer, "lora_A"))
        stacked[member, :rank].uniform_(-bound, bound, generator=generator)
    return stacked


@dataclass(frozen=True, kw_only=True)
class MemberDropout:
    """Dropout of a layer's input in training, with a separate mask for each member."""

    probability: float
    seeds: tuple[int, ...]
    layer: str

    def __call__(self, x: Tensor, clock: DrawClock) -> Tensor:
        """x (M, T, d) -> (M, T, d); see `member_dropout`."""
        return member_dropout(x, self.probability, self.seeds, self.layer, clock)


def member_dropout(x: Tensor, probability: float, seeds: Sequence[int], layer: str, clock: DrawClock) -> Tensor:
    """Dropout whose masks depend only on the member's seed, the layer and the clock: x (M, T, d) -> (M, T, d)."""
    masks = []
    # The first micro batch uses the same seed as an undivided batch.
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
