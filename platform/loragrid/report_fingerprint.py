"""What the trials of a sweep ran on, from their tags: one row per fact, and which trials differ."""

import string
from collections.abc import Mapping
from dataclasses import dataclass

from loragrid.sweep_record import TrialRun

FINGERPRINT_PREFIXES = (
    "loragrid.version.",
    "loragrid.git.",
    "loragrid.system",
    "loragrid.cpu.",
    "loragrid.gpu",
    "loragrid.device",
    "loragrid.precision.",
    "mlflow.source.git.commit",
)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact: its name and every value it has, with the number of trials; more than one value is a difference."""

    name: str
    values: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """groups: trial id -> letter; trials of one letter agree in every fact. Empty where all agree."""

    facts: tuple[Fact, ...]
    groups: Mapping[str, str]

    @property
    def num_groups(self) -> int:
        return len(set(self.groups.values()))


def fingerprints(trials: Mapping[str, TrialRun]) -> Fingerprints:
    """The facts in the order of FINGERPRINT_PREFIXES; a trial without a tag has the value `–`."""
    tags = {
        trial_id: {key: text for key, text in run.tags.items() if key.startswith(FINGERPRINT_PREFIXES)}
        for trial_id, run in trials.items()
    }
    names = sorted(
        {name for own in tags.values() for name in own},
        key=lambda name: (next(i for i, prefix in enumerate(FINGERPRINT_PREFIXES) if name.startswith(prefix)), name),
    )
    facts = []
    for name in names:
        counts: dict[str, int] = {}
        for own in tags.values():
            value = own.get(name, "–")
            counts[value] = counts.get(value, 0) + 1
        facts.append(Fact(name=name, values=tuple(counts.items())))
    distinct: dict[tuple[tuple[str, str], ...], int] = {}
    numbers = {
        trial_id: distinct.setdefault(tuple(sorted(own.items())), len(distinct)) for trial_id, own in tags.items()
    }
    groups = {trial_id: _letter(number) for trial_id, number in numbers.items()} if len(distinct) > 1 else {}
    return Fingerprints(facts=tuple(facts), groups=groups)


def _letter(number: int) -> str:
    """A, B, ... Z, A1, B1, ..."""
    turn, index = divmod(number, 26)
    return string.ascii_uppercase[index] + (str(turn) if turn else "")
