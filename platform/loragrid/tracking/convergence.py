"""Convergence as numbers: the last and best evaluation loss, and how long it took to reach a given one."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Convergence:
    """One trial's evaluation losses so far. `step_seconds` is the time of a step alone, None if it was not measured."""

    threshold: float | None
    step_seconds: float | None = None
    _losses: dict[int, float] = field(default_factory=dict)

    def add(self, records: Sequence[dict[str, float]]) -> None:
        """Take the evaluation losses out of the records."""
        self._losses.update({int(record["step"]): record["eval/loss"] for record in records if "eval/loss" in record})

    def summary(self) -> dict[str, float | None]:
        """The metrics; what never happened, and what was not measured, is None.

        Seconds to the threshold are steps times the step time *alone*: in a pack all members share one clock.
        """
        if not self._losses:
            return {}
        reached = [step for step, loss in sorted(self._losses.items()) if self._below(loss)]
        steps = reached[0] if reached else None
        return {
            "eval/final_loss": self._losses[max(self._losses)],
            "eval/best_loss": min(self._losses.values()),
            "convergence/area_under_eval_curve": self._mean_over_steps(),
            "convergence/steps_to_threshold": steps,
            "convergence/seconds_to_threshold": (
                None if steps is None or self.step_seconds is None else steps * self.step_seconds
            ),
        }

    def _mean_over_steps(self) -> float | None:
        """The area under the evaluation losses over the steps by the trapezoid rule, divided by the steps: nats.

        The mean loss on the way, of straight lines between evaluations: the lower, the sooner it fell. Only trials
        evaluated at the same steps compare. None of a single evaluation.
        """
        points = sorted(self._losses.items())
        if len(points) < 2:
            return None
        area = sum(
            (later - step) * (loss + next_loss) / 2 for (step, loss), (later, next_loss) in itertools.pairwise(points)
        )
        return area / (points[-1][0] - points[0][0])

    def _below(self, loss: float) -> bool:
        return self.threshold is not None and loss <= self.threshold
