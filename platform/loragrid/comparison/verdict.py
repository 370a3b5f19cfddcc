"""Says what a sweep shows and what it does not: every pair of choices tested over seeds and over test rows."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

import pandas as pd

from loragrid.comparison.findings import sentences_of
from loragrid.comparison.item_scores import load_scores
from loragrid.comparison.ranking import TEST_LOSS
from loragrid.comparison.selection import Choice, Contrast, Selection, Verdict, choose
from loragrid.comparison.settings import tasks_of
from loragrid.comparison.statistics import PairedTest, holm, mcnemar, paired_bootstrap, paired_t
from loragrid.comparison.table import Comparison
from loragrid.formatting import format_value, is_missing
from loragrid.tasks.discovery import figure_of


def judge(comparison: Comparison, scores: pd.DataFrame | None = None, apart: Collection[str] = ()) -> Verdict:
    """Every method's choice against every other's: paired t over the seeds they share, paired tests over test rows.

    scores: what `load_scores` gives; without it nothing is tested over rows. Over rows, losses and accuracies are
    averaged over the shared seeds and bootstrapped; correctness of one seed takes McNemar's exact test. Both families,
    over seeds and over rows, are corrected by Holm's method over all pairs. apart: see `choose`.

    A sweep over several models or data sets has no verdict of its own: `tasks_of` gives the parts that have.

    ValueError: `apart` names no axis.
    """
    tasks = tasks_of(comparison)
    if len(tasks) > 1:
        warning = f"several tasks ({'; '.join(tasks)}): their figures are not of one contest, and each is judged apart"
        return _without_choices(warning)
    selection = choose(comparison, apart)
    warnings = [*selection.warnings, *_edge_warnings(selection)]
    choices = selection.choices
    figures = {choice.name: _figures_by_seed(comparison, choice, selection.reported) for choice in choices}
    contrasts: list[Contrast] = []
    for first, second in itertools.combinations(choices, 2):
        shared = sorted(figures[first.name].keys() & figures[second.name].keys())
        values = [[figures[choice.name][seed] for seed in shared] for choice in (first, second)]
        over_items = None
        if scores is not None and shared:
            trials = [[choice.setting.trial_ids[seed] for seed in shared] for choice in (first, second)]
            over_items, words = _over_items(scores, trials[0], trials[1], selection.reported)
            warnings += [f"{first.name} and {second.name}: {word}" for word in words]
        contrasts.append(
            Contrast(
                first=first.name,
                second=second.name,
                metric=selection.reported,
                over_seeds=paired_t(values[0], values[1]) if len(shared) > 1 else None,
                over_items=over_items,
            )
        )
    corrected = _corrected(contrasts)
    return Verdict(
        metric=selection.reported,
        higher_is_better=selection.higher_is_better,
        choices=choices,
        references=selection.references,
        contrasts=corrected,
        sentences=tuple(sentences_of(selection, corrected)),
        warnings=tuple(warnings),
    )


def load_verdict(comparison: Comparison, apart: Collection[str] = ()) -> Verdict:
    """The verdict with tests over test rows: reads the scores of the chosen trials, and theirs alone, from MLflow.

    ValueError: `apart` names no axis.
    """
    if len(tasks_of(comparison)) > 1:
        return judge(comparison, apart=apart)
    chosen = {trial for choice in choose(comparison, apart).choices for trial in choice.setting.trial_ids.values()}
    return judge(comparison, load_scores(comparison, chosen), apart)


def _without_choices(warning: str) -> Verdict:
    return Verdict(
        metric="", higher_is_better=False, choices=(), contrasts=(), sentences=(), warnings=(warning,), references=()
    )


def _figures_by_seed(comparison: Comparison, choice: Choice, metric: str) -> dict[int, float]:
    column = comparison.table.set_index("trial_id").get(metric)
    if column is None:
        return {}
    found = {seed: column.loc[trial_id] for seed, trial_id in choice.setting.trial_ids.items()}
    return {seed: float(value) for seed, value in found.items() if not is_missing(value)}


def _over_items(
    scores: pd.DataFrame, first: Sequence[str], second: Sequence[str], metric: str
) -> tuple[PairedTest | None, list[str]]:
    """The test over the rows that all these trials have scored, and what is wrong with them."""
    figure = figure_of(metric)
    column = figure.column if figure is not None else {TEST_LOSS: "loss"}.get(metric)
    if column is None or column not in scores:
        return None, []
    own = scores[scores["trial_id"].isin([*first, *second])]
    if set(own["trial_id"]) != {*first, *second}:
        return None, []
    # A row that is in the data twice has the same digits twice: its first occurrence is paired with the first.
    keys = [own["row"], own.groupby(["trial_id", "row"]).cumcount()]
    own = own.set_index(keys)
    values = own.pivot(columns="trial_id", values=column)
    items = values.dropna()
    words = [] if len(items) == len(values) else [f"only {len(items)} of {len(values)} test rows are scored by both"]
    if len(items) < 2:
        return None, words
    labels = own[own["trial_id"] == first[0]]["num_labels"].reindex(items.index)
    if figure is not None:
        if figure.is_proportion and len(first) == 1:
            return mcnemar(list(items[first[0]]), list(items[second[0]])), words
        means = [_mean(items, trials) for trials in (first, second)]
        return paired_bootstrap(list(means[0]), list(means[1]), [1.0] * len(items)), words
    scored = labels > 0
    means = [(_mean(items, trials) / labels)[scored] for trials in (first, second)]
    return paired_bootstrap(list(means[0]), list(means[1]), list(labels[scored])), words


def _mean(items: pd.DataFrame, trials: Sequence[str]) -> "pd.Series[float]":
    """Every row's mean over these trials: those of one setting, one per seed."""
    return items[list(trials)].mean(axis="columns")


def _corrected(contrasts: Sequence[Contrast]) -> tuple[Contrast, ...]:
    def adjusted(tests: Sequence[PairedTest | None]) -> list[PairedTest | None]:
        p_values = holm([None if test is None else test.p_value for test in tests])
        return [None if test is None else replace(test, p_adjusted=p) for test, p in zip(tests, p_values, strict=True)]

    seeds = adjusted([contrast.over_seeds for contrast in contrasts])
    items = adjusted([contrast.over_items for contrast in contrasts])
    return tuple(
        replace(contrast, over_seeds=over_seeds, over_items=over_items)
        for contrast, over_seeds, over_items in zip(contrasts, seeds, items, strict=True)
    )


def _edge_warnings(selection: Selection) -> list[str]:
    """One for every axis and end, however many methods are best there."""
    found: dict[tuple[str, str], list[Choice]] = {}
    for choice in selection.choices:
        for axis, side in choice.edge_sides.items():
            found.setdefault((axis, side), []).append(choice)
    warnings = []
    for (axis, side), choices in found.items():
        names = [f"{choice.name} ({format_value(choice.edges[axis])})" for choice in choices]
        if len(choices) == 1:
            value = format_value(choices[0].edges[axis])
            warnings.append(f"{choices[0].name}: its best {axis} ({value}) is the {side} tried: extend the ladder")
        else:
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            warnings.append(f"the {side} {axis} tried is the best of {listed}: extend their ladders")
    return warnings
