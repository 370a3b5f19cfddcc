"""Convergence figures: the last and the best evaluation loss, and the cost of reaching a threshold."""

import numpy as np
import pytest

from loragrid.tracking.convergence import Convergence

RECORDS: list[dict[str, float]] = [
    {"step": 0, "eval/loss": 5.0, "forgetting/loss": 1.0},
    {"step": 5, "train/loss": 0.1},
    {"step": 10, "train/loss": 2.0, "eval/loss": 3.0},
    {"step": 20, "eval/loss": 2.5, "forgetting/loss": 1.25},
    {"step": 30, "eval/loss": 2.75, "forgetting/loss": 1.5},
]


def summary(threshold: float | None, step_seconds: float | None = 0.5) -> dict[str, float | None]:
    convergence = Convergence(threshold=threshold, step_seconds=step_seconds)
    convergence.add(RECORDS[:2])
    convergence.add(RECORDS[2:])
    return convergence.summary()


def test_final_is_the_last_and_best_the_lowest_evaluation() -> None:
    figures = summary(None)
    assert figures["eval/final_loss"] == 2.75
    assert figures["eval/best_loss"] == 2.5
    assert figures["eval/overshoot"] == 0.25


def test_held_out_loss_is_that_of_the_first_best_step() -> None:
    figures = summary(None)
    assert figures["eval/best_step"] == 20
    assert figures["forgetting/best_step_loss"] == 1.25
    equal = Convergence(threshold=None)
    equal.add([{"step": step, "eval/loss": 2.0, "forgetting/loss": float(step)} for step in (8, 4)])
    assert equal.summary()["eval/best_step"] == 4
    assert equal.summary()["forgetting/best_step_loss"] == 4.0


def test_without_a_held_out_text_its_loss_is_missing() -> None:
    convergence = Convergence(threshold=None)
    convergence.add([{"step": 2, "eval/loss": 2.0}])
    assert convergence.summary()["forgetting/best_step_loss"] is None


@pytest.mark.parametrize(
    ("threshold", "steps"),
    [(None, None), (9.0, 0), (5.0, 0), (3.0, 10), (2.9, 20), (2.5, 20), (2.4, None), (0.1, None)],
)
def test_only_the_first_evaluation_below_the_threshold_counts(threshold: float | None, steps: int | None) -> None:
    figures = summary(threshold)
    assert figures["convergence/steps_to_threshold"] == steps
    assert figures["convergence/seconds_to_threshold"] == (None if steps is None else 0.5 * steps)


def test_the_area_is_numpys_trapezoid_divided_by_the_steps() -> None:
    steps, losses = [0, 10, 20, 30], [5.0, 3.0, 2.5, 2.75]
    area = summary(None)["convergence/area_under_eval_curve"]
    assert area == pytest.approx(np.trapezoid(losses, steps) / 30, rel=1e-15)
    flat = Convergence(threshold=None)
    flat.add([{"step": step, "eval/loss": 1.5} for step in (3, 4, 70)])
    assert flat.summary()["convergence/area_under_eval_curve"] == 1.5


def test_of_a_single_evaluation_there_is_no_area() -> None:
    convergence = Convergence(threshold=None)
    convergence.add(RECORDS[:1])
    assert convergence.summary()["convergence/area_under_eval_curve"] is None


def test_without_step_time_only_the_seconds_are_missing() -> None:
    figures = summary(3.0, step_seconds=None)
    assert figures["convergence/steps_to_threshold"] == 10
    assert figures["convergence/seconds_to_threshold"] is None


def test_records_that_come_out_of_order_or_twice_change_nothing() -> None:
    convergence = Convergence(threshold=3.0, step_seconds=0.5)
    for records in (RECORDS[3:], RECORDS[:3], RECORDS[1:4]):
        convergence.add(records)
    assert convergence.summary() == summary(3.0)


def test_before_any_evaluation_there_is_nothing_to_say() -> None:
    convergence = Convergence(threshold=3.0)
    convergence.add([{"step": 1, "train/loss": 1.0}])
    assert convergence.summary() == {}
