"""Convergence as numbers: the last and the best evaluation loss, the held-out loss there, the cost of a threshold."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Convergence:
    """One trial's evaluation losses and held-out losses so far.

    threshold: a loss in nats per token; None: the experiment sets none. step_seconds: seconds per step, measured in a
    pack that holds only this trial; None: not measured.
    """

    threshold: float | None
    step_seconds: float | None = None
    _losses: dict[int, float] = field(default_factory=dict)
    _held_out: dict[int, float] = field(default_factory=dict)

    def add(self, records: Sequence[Mapping[str, float]]) -> None:
        """Add the evaluation losses and the held-out losses in the records; other metrics are ignored."""
        for key, losses in (("eval/loss", self._losses), ("forgetting/loss", self._held_out)):
            losses.update({int(record["step"]): record[key] for record in records if key in record})

    def summary(self) -> dict[str, float | None]:
        """The metrics by key; None if the threshold was not reached or a value was not measured.

        Seconds to the threshold are steps times `step_seconds`, because the members of a pack share one clock.
        """
        if not self._losses:
            return {}
        reached = [step for step, loss in sorted(self._losses.items()) if self._below(loss)]
        steps = reached[0] if reached else None
        final_loss = self._losses[max(self._losses)]
        best_step = min(sorted(self._losses), key=self._losses.__getitem__)
        return {
            "eval/final_loss": final_loss,
            "eval/best_loss": self._losses[best_step],
            "eval/best_step": best_step,
            "eval/overshoot": final_loss - self._losses[best_step],
            "forgetting/best_step_loss": self._held_out.get(best_step),
            "convergence/area_under_eval_curve": self._mean_over_steps(),
            "convergence/steps_to_threshold": steps,
            "convergence/seconds_to_threshold": (
                None if steps is None or self.step_seconds is None else steps * self.step_seconds
            ),
        }

    def _mean_over_steps(self) -> float | None:
        """The area under the evaluation losses over steps by the trapezoid rule, divided by the number of steps.

        This is the mean loss in nats if the loss is linear between evaluations. It is lower if the loss falls earlier.
        It can be compared between trials that are evaluated at the same steps. None if there is a single evaluation.
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
