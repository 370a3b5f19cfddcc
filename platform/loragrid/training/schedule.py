"""The table of learning rates of all members and steps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loragrid.config.experiment import TrainingConfig


def learning_rates(members: Sequence[TrainingConfig]) -> Tensor:
    """Learning rates (steps, M) float64; steps count from 0."""
    assert all(member.warmup_ratio is None for member in members), "it is in steps, see trials/lengths.py"
    return torch.tensor(
        [[member.lr * factor(member, step) for member in members] for step in range(members[0].num_steps)],
        dtype=torch.float64,
    )


def factor(training: TrainingConfig, step: int) -> float:
    """The factor by which the schedule multiplies the peak learning rate.

    It is a linear warm-up from 1/warmup_steps to 1, followed by a constant, or by a linear or cosine decay that would
    reach zero one step after the last. No step has a rate of zero. As transformers' `get_*_schedule_with_warmup`.
    """
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.num_steps - training.warmup_steps)
    return {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.schedule]
