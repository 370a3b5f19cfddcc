"""Writes what a verdict rests on as sentences that can be quoted: references, scope, marks, noise floor."""

from collections.abc import Mapping, Sequence

from loragrid.comparison.choice import Choice, Selection, reported_summary
from loragrid.comparison.claims import Claim
from loragrid.comparison.metric_text import format_difference, format_metric, format_p, format_size
from loragrid.comparison.noise_floor import (
    MIN_GROUPS,
    MIN_SEEDS,
    MOST_SEEDS,
    Design,
    Noise,
    more_rows_help,
    seeds_to_show,
    smallest_difference,
)
from loragrid.comparison.optimism import Optimism
from loragrid.comparison.pairwise import MethodComparison
from loragrid.comparison.ranking import is_higher_better, is_proportion, metric_words
from loragrid.formatting import count_of, format_value

REMEDY = "run with three seeds or more (grid.seed: [0, 1, 2]) and test rows (data.num_test)"


def missing_basis(ranked: Sequence[Choice], metric: str) -> str:
    """The first sentence of a verdict without a comparison: why there is none, and the remedy."""
    if len(ranked) == 1:
        summary = reported_summary(ranked[0], metric)
        assert summary is not None, "only choices with a figure are ranked"
        figure = f"{format_metric(metric, summary.mean)} ({count_of(summary.num, 'seed')})"
        return (
            f"{ranked[0].name} has a {metric_words(metric)} of {figure}; there is no other method to compare it with."
        )
    if not metric.startswith("test/"):
        return (
            "No claim about methods: there are no test rows, so the settings are reported on the rows that chose them; "
            f"{REMEDY}."
        )
    return f"No claim about methods: the methods have no scores of the same test rows on the same seeds; {REMEDY}."


def refusal_sentence(result: MethodComparison, *, is_confirmed: bool) -> str:
    """The first sentence of a verdict that claims nothing, with the remedy. is_confirmed: the seeds are fresh ones."""
    remedy = ""
    if result.num_seeds < MIN_SEEDS:
        key = "confirm: {seeds: 3}" if is_confirmed else "grid.seed: [0, 1, 2]"
        remedy = f" Train with three seeds or more ({key})."
    elif result.effective_groups < MIN_GROUPS:
        remedy = " Set data.num_test to more rows."
    return f"No claim about methods: {result.refusal}.{remedy}"


def reference_sentences(ranked: Sequence[Choice], selection: Selection) -> list[str]:
    """One sentence per reference, with the methods whose mean is no better."""
    words: list[str] = []
    sign = 1 if selection.higher_is_better else -1
    for reference in selection.references:
        base = reported_summary(reference, selection.reported)
        if base is None:
            continue
        means = [(choice.name, reported_summary(choice, selection.reported)) for choice in ranked]
        behind = [name for name, own in means if own is not None and sign * own.mean <= sign * base.mean]
        tail = f"; no better: {', '.join(behind)}" if behind else ""
        words.append(f"The untrained base ({reference.name}) has {format_metric(selection.reported, base.mean)}{tail}.")
    return words


def basis_sentences(
    result: MethodComparison, claims: Sequence[Claim], metric: str, choices: Sequence[Choice]
) -> list[str]:
    """What the claims are about, on what they rest, which differences are marked, and what could have been shown."""
    pairs = sum(test.in_family for test in result.pairs)
    rows = count_of(result.num_rows, "test row")
    if result.num_groups < result.num_rows:
        rows += f" in {count_of(result.num_groups, 'group')}"
    fresh = "fresh " if any(choice.is_confirmed for choice in choices) else ""
    correction = f", corrected for {count_of(pairs, 'pair')} (Holm)" if pairs > 1 else ""
    if pairs < len(result.pairs):
        planned = [{test.first, test.second} for test in result.pairs if test.in_family]
        correction += f": each method against {set.intersection(*planned).pop()}, as planned before the run"
    sentences = [
        "A claim is about new seeds and new rows of the same kind, each method at its chosen setting: "
        f"{result.num_seeds} {fresh}seeds, {rows}, one test per pair{correction}."
    ]
    marked = [claim for claim in claims if claim.is_marked]
    for claim in marked:
        size = format_size(metric, claim.test.difference)
        sentences.append(
            f"{claim.better} is ahead of {claim.worse} by {size} on the seeds that tuned it, which is no claim: "
            f"{claim.mark}. Fresh seeds decide (confirm: {{seeds: 3}})."
        )
    return [*sentences, *_floor_sentences(result, metric)]


def pair_sentence(claim: Claim, metric: str) -> str:
    """One sentence on a pair, from the side of its better method."""
    test = claim.test
    size = format_size(metric, test.difference)
    if test.refusal:
        return f"{claim.better} and {claim.worse}: no claim, {test.refusal}."
    if not test.in_family:
        return f"{claim.better} and {claim.worse}: not among the planned pairs ({size} apart)."
    side = 1 if test.difference >= 0 else -1  # the interval is shown from the side of the better method
    low, high = sorted((side * test.low, side * test.high))
    evidence = (
        f"95 % interval {format_difference(metric, low)} to {format_difference(metric, high)}, p {_p(test.p_adjusted)}"
    )
    if claim.is_shown:
        return f"{claim.better} is better than {claim.worse} by {size} ({evidence})."
    if claim.is_marked:
        return f"{claim.better} is ahead of {claim.worse} by {size}, not confirmed with fresh seeds ({evidence})."
    return f"{claim.better} and {claim.worse} are not told apart ({size} apart; {evidence})."


def trained_sentences(trained: MethodComparison, metric: str, seeds: Sequence[int]) -> list[str]:
    """The separate statement about these trained models: on new rows, with these seeds only."""
    if trained.refusal:
        return [f"Nothing is claimed about these trained models either: {trained.refusal}."]
    shown = [test for test in trained.pairs if test.is_shown]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(str(seed) for seed in seeds)}"
    caveats = [f"A caveat: {caveat}." for caveat in trained.caveats]
    head = f"Of these trained models ({which}), on new rows of the same kind:"
    found = []
    for test in shown:
        first_leads = (test.difference > 0) == is_higher_better(metric)
        better, worse = (test.first, test.second) if first_leads else (test.second, test.first)
        found.append(f"{better} is better than {worse} by {format_size(metric, test.difference)}")
    words = "; ".join(found) if found else "none is shown to be better than another"
    return [f"{head} {words}. Other seeds may reverse this: it is no claim about methods.", *caveats]


def optimism_sentences(optimism: Mapping[str, Optimism | None], metric: str) -> list[str]:
    """How much the chosen settings owe to the seeds that chose them; nothing if no method has several settings."""
    found = {name: own for name, own in optimism.items() if own is not None}
    if not found:
        return []
    words = [
        f"{name} {format_difference(metric, own.value)} ({own.num_settings} settings)" for name, own in found.items()
    ]
    return [
        "Settings were chosen on the seeds that are reported. Optimism, by leaving one seed out (positive: the figure "
        f"flatters): {', '.join(words)}. It is an estimate, not a test."
    ]


def seeds_needed_words(result: MethodComparison, metric: str, margin: float) -> str:
    """How many seeds would show a difference of the margin."""
    noise, design = _noise(result), _design(result)
    if margin <= 0:
        return ""
    number = seeds_to_show(noise, design, margin)
    size = format_size(metric, margin)
    if number is None:
        more = "; more test rows would help." if more_rows_help(noise, design) else "."
        return f"To show a difference of {size} (the margin) would take more than {MOST_SEEDS} seeds{more}"
    if number <= result.num_seeds:
        return ""
    return f"To show a difference of {size} (the margin), about {number} seeds are needed."


def _floor_sentences(result: MethodComparison, metric: str) -> list[str]:
    noise, design = _noise(result), _design(result)
    floor = smallest_difference(noise, design)
    if floor is None or floor == 0:
        return []
    best = abs(best_mean(result, metric))
    share = "" if is_proportion(metric) or floor >= best else f" ({100 * floor / best:.2g} %)"
    more = (
        "more test rows or seeds would lower it" if more_rows_help(noise, design) else "more seeds, not rows, lower it"
    )
    return [
        f"A true difference of {format_size(metric, floor)}{share} is found in most such sweeps (about four of five); "
        f'"not told apart" says little about smaller ones ({more}).'
    ]


def best_mean(result: MethodComparison, metric: str) -> float:
    """The best method's mean."""
    means = [estimate.mean for estimate in result.estimates]
    return max(means) if is_higher_better(metric) else min(means)


def _noise(result: MethodComparison) -> Noise:
    return Noise.measured(
        seed_deviation=result.seed_deviation,
        row_deviation=result.row_deviation,
        row_seed_deviation=result.row_seed_deviation,
        num_seeds=result.num_seeds,
    )


def _design(result: MethodComparison) -> Design:
    return Design(
        num_methods=len(result.estimates),
        num_pairs=sum(test.in_family for test in result.pairs),
        num_seeds=result.num_seeds,
        num_groups=result.effective_groups,
    )


def edge_warnings(choices: Sequence[Choice]) -> list[str]:
    """One warning for every axis and end of its ladder, which names all methods that are best there."""
    found: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        for axis, side in choice.edge_sides.items():
            found.setdefault((axis, side), []).append(choice)
    warnings = []
    for (axis, side), at_edge in found.items():
        names = [f"{choice.name} ({format_value(choice.edges[axis])})" for choice in at_edge]
        if len(at_edge) == 1:
            value = format_value(at_edge[0].edges[axis])
            warnings.append(f"{at_edge[0].name}: its best {axis} ({value}) is the {side} tried: extend the ladder")
        else:
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            warnings.append(f"the {side} {axis} tried is the best of {listed}: extend their ladders")
    return warnings


def _p(value: float | None) -> str:
    """`= 0.012` or `< 0.001`."""
    text = format_p(value)
    return text if text.startswith("<") else f"= {text}"
