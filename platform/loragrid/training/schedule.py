"""Every member's learning rate at every step, as one table."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loragrid.config.experiment import TrainingConfig


def learning_rates(members: Sequence[TrainingConfig]) -> Tensor:
    """The learning rate of member m in step t (counted from 0), (steps, M) float64."""
    return torch.tensor(
        [[member.lr * factor(member, step) for member in members] for step in range(members[0].steps)],
        dtype=torch.float64,
    )


def factor(training: TrainingConfig, step: int) -> float:
    """What the schedule multiplies the peak learning rate with.

    Linear warm-up from 1/warmup_steps to 1, so that no step is lost to a rate of zero; then constant, or linear or
    cosine towards zero, which the step after the last would reach. After transformers' `get_*_schedule_with_warmup`.
    """
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.schedule]
