"""How trials ended: one, and all of a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DIVERGED = "diverged: loss or gradient not finite"
"""How the reason of a trial begins whose numbers left the finite ones: the same would happen again."""

INVARIANT_VIOLATED = "invariant violated"
"""How the reason of a trial begins in whose training something changed that must not: its numbers are worth nothing."""

OUT_OF_MEMORY = "out_of_memory"
"""How the reason of a trial begins for which the device or the machine had no memory left."""

STOPPED_EARLY = "stopped early"
"""How the reason of a trial begins that fell behind and was stopped, which MLflow calls KILLED."""


@dataclass(frozen=True, kw_only=True)
class TrialEnd:
    """How a trial ended, by MLflow's status, and the seconds that its packs spent by phase."""

    status: Literal["FINISHED", "FAILED", "KILLED"]
    reason: str = ""
    traceback: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class SweepOutcome:
    """How every trial ended: trial id -> MLflow status, and for those that failed the reason."""

    statuses: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def is_as_planned(self, trial_id: str) -> bool:
        """Whether the trial finished, or was stopped early as the experiment asks."""
        return self.statuses.get(trial_id) == "FINISHED" or self.reasons.get(trial_id, "").startswith(STOPPED_EARLY)

    def is_final(self, trial_id: str) -> bool:
        """Whether training the trial once more would come to the same end."""
        return self.is_as_planned(trial_id) or self.reasons.get(trial_id, "").startswith(DIVERGED)
