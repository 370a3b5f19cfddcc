"""`MemberAdamW` is `torch.optim.AdamW` after `clip_grad_norm_`, once per member."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loragrid_methods.stacks.optimizer import MemberAdamW, ParameterBlock

LEARNING_RATES = (0.01, 0.3, 0.002, 0.05)
WEIGHT_DECAYS = (0.0, 0.1, 0.5, 0.01)
CLIP_NORMS = (1.0, math.inf, 0.05, 100.0)
NUM_STEPS = 25
# name, first member, number of members, columns, multipliers: members 0-2 share stacks, 2 has a factor; 3 has its own.
LAYOUT: list[tuple[str, int, int, int, tuple[float, ...]]] = [
    ("lora_A", 0, 3, 7, (1.0, 1.0, 1.0)),
    ("lora_B", 0, 3, 5, (1.0, 1.0, 16.0)),
    ("weights", 3, 1, 9, (1.0,)),
]


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def build(generator: torch.Generator, dtype: torch.dtype, **settings: Any) -> MemberAdamW:
    blocks = [
        ParameterBlock(
            name=name,
            start=start,
            weights=random(generator, members, columns, dtype=dtype),
            gradients=torch.zeros(members, columns, dtype=dtype),
            multiplier=torch.tensor(multipliers, dtype=torch.float64).unsqueeze(1),
            shapes={"": torch.Size((members, columns))},
        )
        for name, start, members, columns, multipliers in LAYOUT
    ]
    given: dict[str, Any] = {
        "weight_decay": torch.tensor(WEIGHT_DECAYS, dtype=torch.float64),
        "clip_norm": torch.tensor(CLIP_NORMS, dtype=torch.float64),
        "beta1": 0.9,
        "beta2": 0.99,
        "epsilon": 1e-6,
    }
    return MemberAdamW(blocks, **given | settings)


def train_both(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All weights after ours and after torch's steps, and the norms of all steps appended to each."""
    generator = torch.Generator().manual_seed(0)
    ours = build(generator, dtype)
    parameters: dict[int, list[nn.Parameter]] = {member: [] for member in range(4)}
    optimizers = []
    for block in ours.blocks:
        for index in range(len(block.weights)):
            parameters[block.start + index].append(nn.Parameter(block.weights[index].clone()))
    for member, held in parameters.items():
        factors = [b.multiplier[member - b.start].item() for b in ours.blocks if member in range(4)[b.members]]
        groups = [{"params": [p], "lr": 0.0, "factor": f} for p, f in zip(held, factors, strict=True)]
        optimizers.append(
            torch.optim.AdamW(
                groups, betas=(0.9, 0.99), eps=1e-6, weight_decay=WEIGHT_DECAYS[member], foreach=False, fused=False
            )
        )
    our_norms, their_norms = [], []
    for step in range(NUM_STEPS):
        rate = torch.tensor(LEARNING_RATES, dtype=torch.float64) * (1 - step / 40)
        pending = {member: list(held) for member, held in parameters.items()}
        for block in ours.blocks:
            block.gradients.copy_(random(generator, *block.gradients.shape) * (0.1 if step % 2 else 2.0))
            for index in range(len(block.weights)):
                pending[block.start + index].pop(0).grad = block.gradients[index].clone()
        our_norms.append(ours.clip_gradients())
        ours.step(rate, torch.ones(4, dtype=torch.bool))
        for member, optimizer in enumerate(optimizers):
            their_norms.append(nn.utils.clip_grad_norm_(parameters[member], CLIP_NORMS[member], foreach=False))
            for group in optimizer.param_groups:
                group["lr"] = rate[member].item() * group["factor"]
            optimizer.step()
    weights = torch.cat([block.weights.flatten() for block in ours.blocks])
    expected = []
    for block in ours.blocks:
        for index in range(len(block.weights)):
            expected.append(parameters[block.start + index].pop(0).detach())
    return torch.cat([weights, *our_norms]), torch.cat([*expected, torch.stack(their_norms)])


def test_members_with_their_own_settings_equal_torchs_adamw_in_float64() -> None:
    ours, theirs = train_both(torch.float64)
    assert theirs.isfinite().all()
    assert (ours - theirs).abs().max().item() <= 1e-12


def test_members_with_their_own_settings_equal_torchs_adamw_in_float32() -> None:
    ours, theirs = train_both(torch.float32)
    # 25 updates of size lr <= 5 (0.3 x 16), each rounded at 2^-24 of the weights, which reach 10.
    assert (ours - theirs).abs().max().item() <= 1e-4


def test_the_norms_are_those_before_clipping_and_infinity_clips_nothing() -> None:
    optimizer = build(torch.Generator().manual_seed(0), torch.float64)
    for block in optimizer.blocks:
        block.gradients.fill_(2.0)
    norms = optimizer.clip_gradients()
    expected = [2 * math.sqrt(12)] * 3 + [2 * math.sqrt(9)]
    assert norms.tolist() == pytest.approx(expected, rel=1e-14)
    after = optimizer.clip_gradients().tolist()
    for norm, before, clip in zip(after, expected, CLIP_NORMS, strict=True):
        assert norm == pytest.approx(min(before, clip), rel=1e-4)
    assert after[1] == norms[1].item()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_an_inactive_member_keeps_its_bits_whatever_its_gradients(value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = build(generator, torch.float64)
    before = [block.weights.clone() for block in optimizer.blocks]
    before[0][1, 0] = optimizer.blocks[0].weights[1, 0] = -0.0
    active = torch.tensor([True, False, True, False])
    for _ in range(3):
        for block in optimizer.blocks:
            block.gradients.copy_(random(generator, *block.gradients.shape))
            block.gradients[~active[block.members]] = value
        optimizer.clip_gradients()
        optimizer.step(torch.tensor(LEARNING_RATES, dtype=torch.float64), active)
    for block, held in zip(optimizer.blocks, before, strict=True):
        stays = ~active[block.members]
        assert torch.equal(block.weights[stays].view(torch.int64), held[stays].view(torch.int64))
        assert block.weights[~stays].isfinite().all()
        assert not (block.weights[~stays] == held[~stays]).any()


def test_zero_gradients_keeps_the_views_of_the_buffer() -> None:
    optimizer = build(torch.Generator().manual_seed(0), torch.float64)
    places = [block.gradients.data_ptr() for block in optimizer.blocks]
    for block in optimizer.blocks:
        block.gradients.fill_(1.0)
    optimizer.zero_gradients()
    assert all(block.gradients.count_nonzero() == 0 for block in optimizer.blocks)
    assert places == [block.gradients.data_ptr() for block in optimizer.blocks]
