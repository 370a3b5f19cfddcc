"""Learning rates: warm-up, then constant, linear or cosine, with each member's own settings."""

import math

import pytest
import torch
from torch import nn
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from loragrid.config.experiment import TrainingConfig
from loragrid.training.schedule import factor, learning_rates

STEPS = 20


def settings(**fields: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"steps": STEPS, "lr": 0.5} | fields)


def rates_of_transformers(schedule: str, warmup_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = {
        "constant": lambda: get_constant_schedule(optimizer),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup_steps, STEPS),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup_steps, STEPS),
    }[schedule]()
    rates = []
    for _ in range(STEPS):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 6, STEPS])
def test_after_the_warm_up_the_schedule_is_that_of_transformers(schedule: str, warmup_steps: int) -> None:
    training = settings(schedule=schedule, warmup_steps=warmup_steps)
    ours = [factor(training, step) for step in range(STEPS)]
    expected = rates_of_transformers(schedule, warmup_steps)
    assert ours[warmup_steps:] == pytest.approx(expected[warmup_steps:], abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_warm_up_rises_evenly_to_the_peak(schedule: str) -> None:
    training = settings(schedule=schedule, warmup_steps=4)
    assert [factor(training, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falling_schedules_reach_zero_after_the_last_step(schedule: str) -> None:
    training = settings(schedule=schedule, warmup_steps=3)
    assert factor(training, STEPS) == pytest.approx(0.0, abs=1e-15)
    rates = [factor(training, step) for step in range(3, STEPS)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_half_way_through_a_cosine_the_rate_is_half() -> None:
    assert factor(settings(schedule="cosine"), STEPS // 2) == pytest.approx(0.5)
    assert factor(settings(schedule="cosine"), STEPS // 4) == pytest.approx(0.5 + math.sqrt(0.125))


def test_the_table_is_steps_by_members_in_float64() -> None:
    members = [
        settings(lr=0.1, schedule="constant"),
        settings(lr=1e-4, schedule="linear", warmup_steps=5),
        settings(lr=3.0, schedule="cosine"),
    ]
    table = learning_rates(members)
    assert table.shape == (STEPS, 3)
    assert table.dtype == torch.float64
    for column, member in enumerate(members):
        assert table[:, column].tolist() == [member.lr * factor(member, step) for step in range(STEPS)]
    assert table[:, 0].tolist() == [0.1] * STEPS
