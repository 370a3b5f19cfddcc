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
    near = [
        name
        for name in adapters
        if name not in beaten and (bound := bounds[name]) is not None and bound <= contest.margin
    ]
    if near:
        # Of costs that are not told apart, the better mean decides.
        taken = min(cheapest({name: contest.costs[name].by(contest.cost) for name in near}), key=ordered.index)
        sentence = _take(contest, taken, ordered[0], group, bounds[taken])
    elif all(leader in beaten.get(name, ()) for name in adapters if name != leader):
        taken = leader
        sentence = _take(contest, taken, ordered[0], group, bounds[taken])
    else:
        taken = ""
        sentence = _undecided(contest, leader, beaten, bounds[leader])
    others = [name for name in behind if name != taken]
    # "Better than every other method" has named them already.
    tail = f" Behind: {_listed(others)}." if others and len(others) < len(ordered) - 1 else ""
    tail += _edge_words(contest, ordered)
    return Answer(sentence=sentence + tail, recommended=taken, leader=leader, best_group=group, behind=behind)


def _take(contest: Contest, taken: str, best: str, group: Sequence[str], bound: float | None) -> str:
    choice = next(choice for choice in contest.choices if choice.name == taken)
    facts = []
    rivals = [name for name in group if name != taken]
    if taken in group and rivals:
        facts.append(f"not told apart from {_listed(rivals)}")
    elif taken in group:
        facts.append("better than every other method")
    else:
        stronger = [claim for claim in contest.claims if claim.worse == taken and claim.is_shown]
        words = [f"{claim.better} by {format_size(contest.metric, claim.test.difference)}" for claim in stronger]
        facts.append(f"better than every other adapter, and behind {_listed(words)}")
    dear = next((name for name in [best, *rivals] if name != taken and contest.costs[name].is_whole_model), "")
    if dear or (best != taken and best in group):
        facts += _shares(contest, taken, dear or best)
    text = f"Take {_named(choice)}: {', '.join(facts)}"
    if bound is not None and rivals:
        text += f"; at most {format_size(contest.metric, bound)} behind the best (95 %, new seeds and new rows)"
    return f"{text}."


def _undecided(contest: Contest, leader: str, beaten: Mapping[str, Sequence[str]], bound: float | None) -> str:
    choice = next(choice for choice in contest.choices if choice.name == leader)
    means = {estimate.name: estimate.mean for estimate in contest.result.estimates}
    most = "highest" if contest.higher_is_better else "lowest"
    rivals = [name for name in means if name != leader and leader not in beaten.get(name, ())]
    ahead = [name for name in rivals if name in beaten.get(leader, ())]
    equal = [name for name in rivals if name not in ahead]
    has_reference = any(costs.is_whole_model for costs in contest.costs.values())
    kind, scope = ("adapter", "Of the adapters, ") if has_reference else ("method", "")
    text = (
        f"No {kind} is shown to be the best. {scope}{_named(choice)} has the {most} {metric_words(contest.metric)}, "
        f"{format_metric(contest.metric, means[leader])}; not told apart from it: {_listed(equal)}"
    )
    if ahead:
        text += f"; ahead of it: {_listed(ahead)}"
    if bound is not None:
        text += f"; it may be up to {format_size(contest.metric, bound)} behind the best (95 %)"
    return f"{text}. {contest.seeds_needed}"


def _edge_words(contest: Contest, compared: Sequence[str]) -> str:
    """Which methods were best at the end of a ladder: a value that was never tried may be better."""
    at_edge = [choice.name for choice in contest.choices if choice.edge_sides and choice.name in compared]
    if not at_edge:
        return ""
    verb = "was" if len(at_edge) == 1 else "were"
    return f" {_listed(at_edge)} {verb} best at the end of a ladder, so a longer one may change this."


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
