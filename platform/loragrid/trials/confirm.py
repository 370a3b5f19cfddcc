"""Builds the trials that confirm: each method's chosen setting, trained again with fresh seeds."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from loragrid.trials.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which settings a sweep confirms, and with which fresh seeds; what it records in the tag `CONFIRM_CHOICE_TAG`.

    settings: their ids, see `Trial.setting_id`.
    """

    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    @classmethod
    def of(cls, trials: Sequence[Trial], seeds: Sequence[int]) -> "Chosen":
        """The choice of the settings of these trials."""
        return cls(settings=tuple(trial.setting_id for trial in trials), seeds=tuple(seeds))

    @classmethod
    def from_text(cls, text: str) -> "Chosen":
        """The recorded choice; an empty one if the sweep has recorded none."""
        found = json.loads(text) if text else {"settings": [], "seeds": []}
        return cls(settings=tuple(found["settings"]), seeds=tuple(found["seeds"]))

    def to_text(self) -> str:
        """The choice as it is recorded."""
        return json.dumps({"settings": self.settings, "seeds": self.seeds})

    def has(self, trial: Trial) -> bool:
        """Whether the setting of this trial is among the chosen ones."""
        return trial.setting_id in self.settings


def fresh_seeds(tuning: Collection[int], number: int, recorded: Sequence[int] = ()) -> tuple[int, ...]:
    """`number` seeds that no trial of the grid has: the smallest whole numbers above its largest seed.

    recorded: the fresh seeds of the sweep's earlier runs. They come first, so that a resumed sweep keeps them although
    its grid has grown.

    Raises:
        ValueError: the grid has one of the recorded seeds, so that it is no longer fresh.
    """
    if spent := sorted({*tuning} & {*recorded}):
        raise ValueError(
            f"grid.seed: {', '.join(map(str, spent))}: this sweep has confirmed settings with the seeds "
            f"{', '.join(map(str, recorded))}, so they must have no part in a choice; allowed: other seeds, or a new "
            "sweep"
        )
    first = max([*tuning, *recorded]) + 1
    return (*recorded, *range(first, first + number))[:number]


def confirm_trials(chosen: Sequence[Trial], seeds: Sequence[int]) -> tuple[Trial, ...]:
    """Every chosen setting with every fresh seed. chosen: one trial of each setting, with any seed."""
    return tuple(trial.with_seed(seed, "confirm") for trial in chosen for seed in seeds)
