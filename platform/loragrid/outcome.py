"""How the trials of a sweep ended."""

from dataclasses import dataclass, field

from loragrid.glossary import DIVERGED, STOPPED_EARLY


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
