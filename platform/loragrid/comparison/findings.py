"""Writes a verdict as sentences that can be quoted, with figures, intervals, n and corrected p-values."""

from collections.abc import Sequence

from loragrid.comparison.ranking import is_higher_better, metric_words
from loragrid.comparison.selection import Choice, Contrast, Selection, Verdict, reported_interval
from loragrid.comparison.settings import show_setting
from loragrid.comparison.statistics import CONFIDENCE, Interval, PairedTest
from loragrid.formatting import count_of

LEVEL = round(1 - CONFIDENCE, 10)  # 1 - 0.95 is a little more than 0.05
"""A difference is shown if its corrected p-value is below this level."""

MAX_PAIRS_IN_WORDS = 3
"""If more pairs than this do not include the best contestant, they are counted instead of described one by one."""


ROWS_CAVEAT = (
    "The tests over rows assume that test rows are independent: if several belong to one conversation or prompt, their "
    "p-values are too small."
)


def was_chosen(verdict: Verdict) -> bool:
    """Whether any method has more than one setting."""
    return any(choice.num_settings > 1 for choice in (*verdict.choices, *verdict.references))


def trials_caption(verdict: Verdict) -> str:
    """The first half of a chart's caption: which trials represent each method, and that they are averaged."""
    everyone = (*verdict.choices, *verdict.references)
    who = "contestant" if any(choice.apart for choice in everyone) else "method"
    if not everyone:
        return "All trials of every method, because none has a figure to choose a setting by: mean over them"
    if not was_chosen(verdict):
        return f"The only setting of every {who}: mean over its seeds"
    rest = "" if all(choice.num_settings > 1 for choice in everyone) else ", or its only one"
    return f"The chosen setting of every {who}{rest}: mean over its seeds"


def heading_of_choices(verdict: Verdict) -> str:
    """The heading of the table of choices."""
    return "Every method at its best setting" if was_chosen(verdict) else "Every method's figures"


def sentences_of(selection: Selection, contrasts: Sequence[Contrast]) -> list[str]:
    """The findings: the best choice, the references, the tested pairs, and the limits of the evidence."""
    ranked = [choice for choice in selection.choices if reported_interval(choice, selection.reported) is not None]
    if not ranked:
        return ["Nothing can be compared yet: no method has a finished trial with a figure to report."]
    best = ranked[0]
    sentences = [_leader(best, selection, ranked[1:]), *_reference_words(ranked, selection)]
    if len(ranked) == 1:
        return sentences
    tested = [contrast for contrast in contrasts if contrast.over_seeds or contrast.over_items]
    with_best = [contrast for contrast in tested if best.name in (contrast.first, contrast.second)]
    sentences += [pair_words(contrast) for contrast in with_best]
    sentences += _rest_words([contrast for contrast in tested if contrast not in with_best])
    if len(tested) > 1:
        sentences.append(
            f"The p-values are Holm's over all {len(tested)} pairs; the intervals are not corrected for their number."
        )
    if any(not is_shown(test) for contrast in tested for test in (contrast.over_seeds, contrast.over_items) if test):
        sentences.append('"No difference shown" is not "equal": the interval shows how large a difference may remain.')
    return sentences + _limits(ranked, contrasts)


def pair_words(contrast: Contrast) -> str:
    """One sentence on a pair, from the side of its first choice: over seeds, then over test rows."""
    clauses = [
        _clause(test, kind, contrast)
        for test, kind in ((contrast.over_seeds, "seeds"), (contrast.over_items, "test rows"))
        if test is not None
    ]
    return f"{contrast.first} against {contrast.second}: {'; '.join(clauses)}."


def is_shown(test: PairedTest | None) -> bool:
    """Whether the test shows a difference after the correction for the number of pairs."""
    return test is not None and test.p_adjusted is not None and test.p_adjusted < LEVEL


def show_interval(interval: Interval) -> str:
    """Mean ± half of the width of the 95 % interval, and n: `2.2500 ± 0.0123 (3)`."""
    if interval.high is None:
        return f"{interval.mean:.4f} ({interval.num})"
    return f"{interval.mean:.4f} ± {interval.high - interval.mean:.4f} ({interval.num})"


def show_p(p_value: float) -> str:
    """A p-value with two digits. One that is below `LEVEL` but rounds to it is written as `p < 0.05`."""
    if p_value < 0.001:
        return "p < 0.001"
    text = f"{p_value:.2g}"
    return f"p < {LEVEL:g}" if p_value < LEVEL <= float(text) else f"p = {text}"


def _leader(best: Choice, selection: Selection, others: Sequence[Choice]) -> str:
    interval = reported_interval(best, selection.reported)
    assert interval is not None
    most = "highest" if selection.higher_is_better else "lowest"
    values = f" ({show_setting(best.setting, best.apart)})" if best.setting.values.keys() - best.apart else ""
    metric = metric_words(selection.reported)
    spread = "" if interval.low is None else f"95 % interval {interval.low:.4f} to {interval.high:.4f}, "
    figure = f"{interval.mean:.4f} ({spread}n = {count_of(interval.num, 'seed')})"
    if not others:
        return f"{best.name}{values} has a {metric} of {figure}; there is no other method to compare it with."
    # Accuracies on the same rows are often equal, and then the order is that of the experiment file.
    equals = [choice.name for choice in others if _mean_of(choice, selection) == interval.mean]
    shared = f", and {', '.join(equals)} the same" if equals else ""
    return f"{best.name}{values} has the {most} {metric}: {figure}{shared}."


def _mean_of(choice: Choice, selection: Selection) -> float | None:
    interval = reported_interval(choice, selection.reported)
    return None if interval is None else interval.mean


def _reference_words(ranked: Sequence[Choice], selection: Selection) -> list[str]:
    words: list[str] = []
    sign = 1 if selection.higher_is_better else -1
    for reference in selection.references:
        base = reported_interval(reference, selection.reported)
        if base is None:
            continue
        intervals = [(choice.name, reported_interval(choice, selection.reported)) for choice in ranked]
        behind = [name for name, own in intervals if own is not None and sign * own.mean <= sign * base.mean]
        tail = f"; no better: {', '.join(behind)}" if behind else ""
        words.append(f"The untrained base ({reference.name}) has {base.mean:.4f}{tail}.")
    return words


def _clause(test: PairedTest, kind: str, contrast: Contrast) -> str:
    over = f"over {test.num} {kind}"
    sign = 1 if is_higher_better(contrast.metric) else -1
    if test.p_value is None or test.p_adjusted is None or test.low is None or test.high is None:
        return f"cannot be tested {over}"
    ends = sorted((sign * test.low, sign * test.high))
    gain = sign * test.difference
    if is_shown(test) and gain < 0:
        evidence = f"95 % interval {-ends[1]:.4f} to {-ends[0]:.4f}, {show_p(test.p_adjusted)}"
        return f"worse by {-gain:.4f} {over} ({evidence})"
    evidence = f"95 % interval {_signed(ends[0])} to {_signed(ends[1])}, {show_p(test.p_adjusted)}"
    if is_shown(test):
        return f"better by {gain:.4f} {over} ({evidence})"
    by = "worse" if gain < 0 else "better"
    size = f"{abs(gain):.4f} {by}" if gain else "the same"
    return f"no difference shown {over} ({size}; {evidence})"


def _rest_words(contrasts: Sequence[Contrast]) -> list[str]:
    if len(contrasts) <= MAX_PAIRS_IN_WORDS:
        return [pair_words(contrast) for contrast in contrasts]
    counts = []
    for attribute, kind in (("over_seeds", "seeds"), ("over_items", "test rows")):
        tests = [test for contrast in contrasts if (test := getattr(contrast, attribute)) is not None]
        if tests:
            counts.append(f"{sum(is_shown(test) for test in tests)} of {len(tests)} over {kind}")
    return [f"Among the other {len(contrasts)} pairs differences were shown: {', '.join(counts)}."]


def _limits(ranked: Sequence[Choice], contrasts: Sequence[Contrast]) -> list[str]:
    """Sentences on conclusions that the seeds and rows do not support."""
    shared = [contrast.over_seeds.num for contrast in contrasts if contrast.over_seeds is not None]
    over_items = any(contrast.over_items is not None for contrast in contrasts)
    limits: list[str] = []
    if not shared:
        one = "One seed" if max(len(c.setting.trial_ids) for c in ranked) == 1 else "No two seeds in common"
        scope = "the tests over rows hold only for these trained adapters" if over_items else "no pair was tested"
        limits.append(f"{one}: nothing is known about other seeds, which may reverse any of this; {scope}.")
    elif any(is_shown(c.over_items) and c.over_seeds is not None and not is_shown(c.over_seeds) for c in contrasts):
        limits.append(
            "A difference shown only over test rows holds for these trained adapters: other seeds might reverse it."
        )
    if shared and min(shared) == 2:
        limits.append("Two seeds: over them, only a difference much larger than its own variation can be shown.")
    return limits


def _signed(value: float) -> str:
    return f"{value:.4f}".replace("-", "−")
