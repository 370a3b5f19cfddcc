"""The answer for a person who must choose a method: what to take, how sure that is, and what would decide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loragrid.comparison.choice import Choice
from loragrid.comparison.choice_costs import ChoiceCosts
from loragrid.comparison.claims import Claim, beaten_by
from loragrid.comparison.costs import cheapest
from loragrid.comparison.metric_text import format_metric, format_size
from loragrid.comparison.pairwise import MethodComparison
from loragrid.comparison.ranking import metric_words
from loragrid.comparison.settings import show_setting

_COST_WORDS = {"parameters": "parameters", "memory": "memory", "time": "time per step"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the verdict tells a person who must choose.

    sentence: the first line of every report. recommended: the name of the choice to take; "" if none can be
    recommended. leader: the adapter with the best mean, whether or not it is recommended; "" if no claim is possible.
    best_group: the methods that none is shown to beat. behind: the others.
    """

    sentence: str
    recommended: str = ""
    leader: str = ""
    best_group: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Everything that decides the answer.

    margin: how far behind the best a recommended method may be, in the metric's unit. cost: see `VerdictConfig`.
    seeds_needed: how many seeds would show a difference of the margin, in words.
    """

    metric: str
    higher_is_better: bool
    choices: Sequence[Choice]
    costs: Mapping[str, ChoiceCosts]
    result: MethodComparison
    claims: Sequence[Claim]
    margin: float
    cost: str
    seeds_needed: str


def answer_of(contest: Contest) -> Answer:
    """The recommended adapter, or the reason why there is none.

    Taken is the cheapest adapter that none is shown to beat and that is at most the margin behind the best (Hsu's
    bound, 95 %). Without one, the adapter with the best mean is taken if it is shown to beat every other adapter.
    Otherwise nothing is recommended: a sweep with too few seeds or rows must not recommend by its lack of power.
    """
    beaten = beaten_by(contest.claims)
    means = {estimate.name: estimate.mean for estimate in contest.result.estimates}
    bounds = {estimate.name: estimate.behind for estimate in contest.result.estimates}
    ordered = sorted(means, key=lambda name: -means[name] if contest.higher_is_better else means[name])
    adapters = [name for name in ordered if not contest.costs[name].is_whole_model] or ordered
    leader = adapters[0]
    group = tuple(name for name in ordered if name not in beaten)
    behind = tuple(name for name in ordered if name in beaten)
    # The bound of a method rests on its lead; a lead that tuning can have made bounds nothing.
    doubtful = {claim.better for claim in contest.claims if claim.is_marked}
    near = [
        name
        for name in adapters
        if name not in beaten
        and name not in doubtful
        and (bound := bounds[name]) is not None
        and bound <= contest.margin
    ]
    if near:
        # Of costs that are not told apart, the better mean decides.
        taken = min(cheapest({name: contest.costs[name].by(contest.cost) for name in near}), key=ordered.index)
        sentence = _take(contest, taken, ordered, adapters, bounds[taken])
    elif len(adapters) > 1 and all(leader in beaten.get(name, ()) for name in adapters if name != leader):
        taken = leader
        sentence = _take(contest, taken, ordered, adapters, bounds[taken])
    else:
        taken = ""
        sentence = _undecided(contest, adapters, beaten, bounds[leader])
    anchor = taken or leader
    others = [name for name in behind if anchor in beaten[name]]
    # "Better than every other method" has named them already.
    tail = f" Behind it: {_listed(others)}." if others and len(others) < len(ordered) - 1 else ""
    tail += _missing_words(contest, ordered) + _edge_words(contest, ordered)
    return Answer(sentence=sentence + tail, recommended=taken, leader=leader, best_group=group, behind=behind)


def _take(contest: Contest, taken: str, ordered: Sequence[str], adapters: Sequence[str], bound: float | None) -> str:
    """ordered, adapters: the compared methods, and the adapters among them, best mean first."""
    choice, best = next(choice for choice in contest.choices if choice.name == taken), ordered[0]
    standing = [f"{words} {_listed(names)}" for words, names in _standing(contest, taken).items() if names]
    stronger = [claim for claim in contest.claims if claim.worse == taken and claim.is_shown]
    if stronger:
        words = [f"{claim.better} by {format_size(contest.metric, claim.test.difference)}" for claim in stronger]
        facts = [f"better than every other adapter, and behind {_listed(words)}", *standing]
    else:
        facts = standing or ["better than every other compared method"]
    whole = [claim.better for claim in stronger] + [name for name in ordered if contest.costs[name].is_whole_model]
    if whole or best != taken:
        facts += _shares(contest, taken, (whole or [best])[0])
    text = f"Take {_named(choice)}{_reason(contest, taken, best, adapters) if standing else ''}: {', '.join(facts)}"
    if bound is not None and bound > 0 and not stronger and standing:
        text += f"; at most {format_size(contest.metric, bound)} behind the best (95 %, new seeds and new rows)"
    return f"{text}."


def _reason(contest: Contest, taken: str, best: str, adapters: Sequence[str]) -> str:
    """Why this method of several that are not told apart."""
    most = f"the {'highest' if contest.higher_is_better else 'lowest'} {metric_words(contest.metric)}"
    if taken == best:
        return f", which has {most}"
    if taken == adapters[0]:
        return f", which has {most} of the adapters"
    return f", the cheapest by {_COST_WORDS[contest.cost]}"


def _undecided(
    contest: Contest, adapters: Sequence[str], beaten: Mapping[str, Sequence[str]], bound: float | None
) -> str:
    """adapters: best mean first; the first leads."""
    leader = adapters[0]
    choice = next(choice for choice in contest.choices if choice.name == leader)
    means = {estimate.name: estimate.mean for estimate in contest.result.estimates}
    most = "highest" if contest.higher_is_better else "lowest"
    figure = f"{metric_words(contest.metric)}, {format_metric(contest.metric, means[leader])}"
    if len(adapters) == 1:
        text = f"{_named(choice)} is the only adapter that is compared; it has a {figure.replace(',', ' of', 1)}"
    elif len(adapters) < len(means):
        text = f"No adapter is shown to be the best. Of the adapters, {_named(choice)} has the {most} {figure}"
    else:
        text = f"No method is shown to be the best. {_named(choice)} has the {most} {figure}"
    text += "".join(f"; {words} {_listed(names)}" for words, names in _standing(contest, leader).items() if names)
    if ahead := beaten.get(leader):
        text += f"; behind {_listed(ahead)}"
    if bound is not None and bound > 0:
        text += f"; {leader} may be up to {format_size(contest.metric, bound)} behind the best (95 %)"
    return f"{text}. {contest.seeds_needed}".rstrip()


def _standing(contest: Contest, anchor: str) -> dict[str, list[str]]:
    """Words -> the methods that the anchor neither is shown to beat nor is shown to be behind, by the reason."""
    found: dict[str, list[str]] = {
        "not told apart from": [],
        "no confirmed difference to": [],
        "no claim against": [],
        "by the plan not tested against": [],
    }
    for claim in contest.claims:
        if claim.is_shown or anchor not in (claim.better, claim.worse):
            continue
        other = claim.worse if claim.better == anchor else claim.better
        if claim.test.refusal:
            words = "no claim against"
        elif not claim.test.in_family:
            words = "by the plan not tested against"
        else:
            words = "no confirmed difference to" if claim.is_marked else "not told apart from"
        found[words].append(other)
    return found


def _missing_words(contest: Contest, compared: Sequence[str]) -> str:
    missing = [choice.name for choice in contest.choices if choice.name not in compared]
    return f" Not compared: {_listed(missing)}." if missing else ""


def _edge_words(contest: Contest, compared: Sequence[str]) -> str:
    """Which methods were best at the end of a ladder: a value that was never tried may be better."""
    at_edge = [choice.name for choice in contest.choices if choice.edge_sides and choice.name in compared]
    if not at_edge:
        return ""
    values = "value of" if len(at_edge) == 1 else "values of"
    last = "was the last" if len(at_edge) == 1 else "were the last"
    return f" The best {values} {_listed(at_edge)} {last} of a ladder, so a longer one may change this."


def _shares(contest: Contest, taken: str, other: str) -> list[str]:
    """What it takes of the other's costs: "with 4 % of the parameters and 56 % of the memory of full"."""
    own, theirs = contest.costs[taken], contest.costs[other]
    parts = []
    for cost in ("parameters", "memory"):
        mine, whole = own.by(cost), theirs.by(cost)
        if mine is not None and whole is not None and mine.median < 0.995 * whole.median:
            share = 100 * mine.median / whole.median
            parts.append(
                f"{share:.2g} % of the {_COST_WORDS[cost]}"
                if share < 10
                else f"{share:.0f} % of the {_COST_WORDS[cost]}"
            )
    return [f"with {' and '.join(parts)} of {other}"] if parts else []


def _named(choice: Choice) -> str:
    own = {axis for axis in choice.setting.values if axis not in choice.apart}
    return f"{choice.name} ({show_setting(choice.setting, choice.apart)})" if own else choice.name


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
