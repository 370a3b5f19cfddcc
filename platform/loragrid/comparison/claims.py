"""Decides which tested differences may be claimed: a difference that tuning can have made is marked, not claimed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loragrid.comparison.choice import Choice
from loragrid.comparison.pairwise import MethodComparison, PairTest

UNEQUAL_BUDGET = 2.0
"""A method that tried more than this many times as many settings as another has a lead for nothing."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A tested pair, read from the side of the better method.

    better, worse: names; better is the one with the better mean. test: the pair's test. is_shown: whether the
    difference is claimed. mark: why a difference that the test shows is not claimed; "" if there is no such reason.
    """

    better: str
    worse: str
    test: PairTest
    mark: str = ""

    @property
    def is_shown(self) -> bool:
        return self.test.is_shown and not self.mark

    @property
    def is_marked(self) -> bool:
        """Whether the test shows a difference that tuning on the reported seeds can have made."""
        return self.test.is_shown and bool(self.mark)


def claims_of(result: MethodComparison, choices: Sequence[Choice], higher_is_better: bool) -> tuple[Claim, ...]:
    """Every pair of the comparison as a claim, in the order of its tests.

    Test rows are held out, but seeds are not: a setting is chosen partly for the luck of its seeds. Over equally many
    settings this cancels. It does not if the better method tried more than twice as many settings; then a difference is
    shown only with fresh seeds (`confirm`). The luck of a far noisier method is in the tests, see `seed_spread`.
    """
    by_name = {choice.name: choice for choice in choices}
    found = []
    for test in result.pairs:
        first_leads = (test.difference > 0) == higher_is_better
        names = (test.first, test.second) if first_leads else (test.second, test.first)
        better, worse = by_name[names[0]], by_name[names[1]]
        mark = _mark(better, worse)
        found.append(Claim(better=better.name, worse=worse.name, test=test, mark=mark))
    return tuple(found)


def beaten_by(claims: Sequence[Claim]) -> Mapping[str, tuple[str, ...]]:
    """Method -> the methods that are shown to be better; methods that none is shown to beat are left out."""
    found: dict[str, list[str]] = {}
    for claim in claims:
        if claim.is_shown:
            found.setdefault(claim.worse, []).append(claim.better)
    return {name: tuple(names) for name, names in found.items()}


def _mark(better: Choice, worse: Choice) -> str:
    if better.is_confirmed and worse.is_confirmed:
        return ""
    if better.num_settings > UNEQUAL_BUDGET * worse.num_settings:
        return f"{better.num_settings} settings against {worse.num_settings} can make such a lead by luck"
    return ""
