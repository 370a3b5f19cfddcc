"""One log per trial of a worker: its curve, figures, tags, seconds and rankings at rungs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loragrid.training.member_state import MemberState
from loragrid.trials.successive_halving import SettingScore
from loragrid.trials.tags import SPLIT_TAG
from loragrid.worker.saved_trial import SavedTrial


@dataclass(kw_only=True)
class TrialLog:
    """Everything that has been reported about one trial, by this worker and by earlier ones.

    records: the curve, one record per step. latest: metric key -> its latest value, also from steps that a halved pack
    repeated. rankings: rung -> all settings that were ranked there with its own, best first. seconds: by phase.
    """

    records: list[dict[str, float]] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    rankings: dict[int, list[SettingScore]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    has_ended: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether the trial has been measured in a pack of one."""
        return "time/step_seconds" in self.figures

    @property
    def was_split(self) -> bool:
        """Whether the trial's pack is part of a halved pack; its seconds then include those spent in the whole pack."""
        return SPLIT_TAG in self.tags

    @property
    def last_step(self) -> int:
        """The last step with a training loss; 0 if there is none."""
        return max((int(record["step"]) for record in self.records if "train/loss" in record), default=0)

    def add_records(self, found: Sequence[dict[str, float]]) -> list[dict[str, float]]:
        """Append records and return the new ones: a pack that was halved repeats steps that were already reported."""
        for record in found:
            self.latest.update(record)
        known = self.records
        new = [record for record in found if not known or record["step"] > known[-1]["step"]]
        known += new
        return new

    def add_tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        """Set tags and return those that are new or changed."""
        new = {key: value for key, value in tags.items() if self.tags.get(key) != value}
        self.tags |= new
        return new

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by phase."""
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def saved_with(self, state: MemberState) -> SavedTrial:
        """The trial's state together with this log, as it is stored."""
        return SavedTrial(
            state=state,
            records=self.records,
            figures=self.figures,
            seconds=dict(self.seconds),
            rankings=self.rankings,
        )

    @classmethod
    def of(cls, saved: SavedTrial) -> "TrialLog":
        """The log of a trial that earlier workers have saved."""
        log = cls(
            records=list(saved.records),
            figures=dict(saved.figures),
            seconds=dict(saved.seconds),
            rankings=dict(saved.rankings),
        )
        for record in saved.records:
            log.latest.update(record)
        return log


class TrialLogs(dict[str, TrialLog]):
    """Trial id -> its log; a trial without one gets an empty log when it is first looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.diverged_settings: set[str] = set()
        """The ids of the settings of which a trial has diverged, also with earlier workers."""

    def __missing__(self, trial_id: str) -> TrialLog:
        return self.setdefault(trial_id, TrialLog())

    def mark_ended(self, trial_ids: Iterable[str]) -> None:
        """Note that these trials have ended."""
        for trial_id in trial_ids:
            self[trial_id].has_ended = True

    def latest(self, trial_ids: Iterable[str], metric: str) -> dict[str, float]:
        """Trial id -> the metric's latest value, for trials that have one."""
        return {trial_id: self[trial_id].latest[metric] for trial_id in trial_ids if metric in self[trial_id].latest}

    def rankings(self, trial_ids: Iterable[str], rung: int) -> list[list[SettingScore]]:
        """The rankings already made at a rung, one per queue: all settings that were ranked, best first."""
        known = (self[trial_id].rankings.get(rung) for trial_id in trial_ids)
        return list({tuple(ranking): ranking for ranking in known if ranking is not None}.values())
