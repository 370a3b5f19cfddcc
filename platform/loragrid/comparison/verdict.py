"""Judges a sweep: tests every pair of choices over seeds and over test rows, and writes the findings."""

import itertools
from collections.abc import Collection, Mapping, Sequence
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
    """Compare every method's choice with every other: paired t test over shared seeds, paired tests over test rows.

    scores: the result of `load_scores`; None: nothing is tested over rows. Over rows, losses and accuracies are
    averaged over the shared seeds and bootstrapped; for the correctness of one seed McNemar's exact test is used.
    Holm's correction is applied over all pairs, separately over seeds and over rows. apart: see `choose`.

    A sweep over several models or data sets has no common verdict; judge its parts, see `tasks_of`.

    Raises:
        ValueError: `apart` names no axis.
    """
    tasks = tasks_of(comparison)
    if len(tasks) > 1:
        warning = f"several tasks ({'; '.join(tasks)}): their figures cannot be compared, so each is judged separately"
        return _without_choices(warning)
    selection = choose(comparison, apart)
    warnings = [*selection.warnings, *_edge_warnings(selection)]
    choices = selection.choices
    figures = {choice.name: _figures_by_seed(comparison, choice, selection.reported) for choice in choices}
    contrasts: list[Contrast] = []
    for first, second in itertools.combinations(choices, 2):
        contrast, words = _contrast(first, second, figures, scores, selection.reported)
        contrasts.append(contrast)
        warnings += [f"{first.name} and {second.name}: {word}" for word in words]
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
    """The verdict with tests over test rows; reads the scores of the chosen trials from MLflow.

    Raises:
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


def _contrast(
    first: Choice,
    second: Choice,
    figures: Mapping[str, Mapping[int, float]],
    scores: pd.DataFrame | None,
    metric: str,
) -> tuple[Contrast, list[str]]:
    """The tests of one pair, not yet corrected, and warnings about their rows. figures: choice -> seed -> figure."""
    shared = sorted(figures[first.name].keys() & figures[second.name].keys())
    values = [[figures[choice.name][seed] for seed in shared] for choice in (first, second)]
    over_items, warnings = None, list[str]()
    if scores is not None and shared:
        trials = [[choice.setting.trial_ids[seed] for seed in shared] for choice in (first, second)]
        over_items, warnings = _over_items(scores, trials[0], trials[1], metric)
    contrast = Contrast(
        first=first.name,
        second=second.name,
        metric=metric,
        over_seeds=paired_t(values[0], values[1]) if len(shared) > 1 else None,
        over_items=over_items,
    )
    return contrast, warnings


def _over_items(
    scores: pd.DataFrame, first: Sequence[str], second: Sequence[str], metric: str
) -> tuple[PairedTest | None, list[str]]:
    """The test over the rows that all these trials have scored, and warnings about rows that are missing."""
    figure = figure_of(metric)
    column = figure.column if figure is not None else {TEST_LOSS: "loss"}.get(metric)
    if column is None or column not in scores:
        return None, []
    own = scores[scores["trial_id"].isin([*first, *second])]
    if set(own["trial_id"]) != {*first, *second}:
        return None, []
    # A row that occurs twice in the data has the same digits both times; its occurrences are paired in order.
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
    """Every row's mean over the trials of one setting (one per seed)."""
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
    """One warning for every axis and end of its ladder, which names all methods that are best there."""
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
