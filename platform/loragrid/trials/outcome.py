"""How a trial ended, and how all trials of a sweep ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DIVERGED = "diverged: loss or gradient not finite"
"""Beginning of the reason of a trial whose loss or gradient is not finite; training it again would end the same way."""

INVARIANT_VIOLATED = "invariant violated"
"""Beginning of the reason of a trial in which a frozen tensor or the trainable set changed; its figures are invalid."""

OUT_OF_MEMORY = "out_of_memory"
"""Beginning of the reason of a trial for which the device or the machine had too little memory."""

STOPPED_EARLY = "stopped early"
"""Beginning of the reason of a trial that fell behind and was stopped; its MLflow status is KILLED."""


@dataclass(frozen=True, kw_only=True)
class TrialEnd:
    """How a trial ended, with MLflow's status. seconds: phase -> seconds that the trial's packs spent in it."""

    status: Literal["FINISHED", "FAILED", "KILLED"]
    reason: str = ""
    traceback: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class SweepOutcome:
    """How every trial ended. statuses: trial id -> MLflow status. reasons: trial id -> reason, if it did not finish."""

    statuses: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def is_as_planned(self, trial_id: str) -> bool:
        """Whether the trial finished, or was stopped early as the experiment requests."""
        return self.statuses.get(trial_id) == "FINISHED" or self.reasons.get(trial_id, "").startswith(STOPPED_EARLY)

    def is_final(self, trial_id: str) -> bool:
        """Whether training the trial again would end the same way."""
        return self.is_as_planned(trial_id) or self.reasons.get(trial_id, "").startswith(DIVERGED)
