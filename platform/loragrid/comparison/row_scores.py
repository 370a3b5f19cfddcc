"""Arranges the scores of the chosen settings' trials as methods x seeds x rows, for the comparison of methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from loragrid.comparison.choice import Choice
from loragrid.comparison.noise_floor import MIN_SEEDS
from loragrid.comparison.pairwise import MethodScores
from loragrid.comparison.ranking import TEST_LOSS, is_higher_better, is_proportion
from loragrid.formatting import count_of
from loragrid.tasks.discovery import figure_of


@dataclass(frozen=True, kw_only=True)
class ArrangedScores:
    """The scores that all compared methods have in common.

    scores: None if fewer than two methods share a seed and two rows. seeds: the common seeds. warnings: methods, seeds
    and rows that had to be left out.
    """

    scores: MethodScores | None
    seeds: tuple[int, ...]
    warnings: tuple[str, ...]


def arrange_scores(choices: Sequence[Choice], scores: pd.DataFrame | None, metric: str) -> ArrangedScores:
    """The scores of the choices' reported trials on the seeds and rows that every compared method has.

    scores: the result of `load_scores`. metric: the reported metric. A method without scores is left out. So is a
    method with fewer than three seeds if the others have three in common without it: this rule looks at no figure. A
    row that occurs twice in the data has the same digits both times; its occurrences are paired in order.
    """
    figure = figure_of(metric)
    column = figure.column if figure is not None else {TEST_LOSS: "loss"}.get(metric)
    if scores is None or column is None or column not in scores:
        return ArrangedScores(scores=None, seeds=(), warnings=())
    finite = np.isfinite(scores[column].to_numpy(dtype=float, na_value=np.nan))
    scores = scores.assign(**{column: scores[column].where(finite)})
    scored = set(scores.loc[finite, "trial_id"])
    trials = {
        choice.name: {seed: trial_id for seed, trial_id in choice.reported_trials.items() if trial_id in scored}
        for choice in choices
    }
    unscored = [name for name, by_seed in trials.items() if not by_seed]
    trials, warnings = _with_common_seeds({name: by_seed for name, by_seed in trials.items() if by_seed})
    if trials:
        warnings += [f"{name}: it has no scores of single test rows; it is not compared" for name in unscored]
    seeds = _common(trials)
    if len(trials) > 1 and len(seeds) < MIN_SEEDS <= max(map(len, trials.values())):
        own = [f"{name} {', '.join(map(str, sorted(by_seed)))}" for name, by_seed in trials.items()]
        warnings.append(f"methods have different seeds, and only common ones count: {'; '.join(own)}")
    if len(trials) < 2 or not seeds:
        return ArrangedScores(scores=None, seeds=seeds, warnings=tuple(warnings))
    wanted = [by_seed[seed] for by_seed in trials.values() for seed in seeds]
    values, rows = _pivot(scores, wanted, column)
    if len(rows) < len(values):
        have = f"only {len(rows)} of {count_of(len(values), 'test row')} are scored by every compared trial"
        warnings.append(f"{have}; the others are left out of the comparison")
    by_loss = column == "loss"
    if by_loss:
        rows = rows[rows["num_labels"] > 0]
    if len(rows) < 2:
        return ArrangedScores(scores=None, seeds=seeds, warnings=tuple(warnings))
    found = values.loc[rows.index, wanted].to_numpy(dtype=float).T
    weights = rows["num_labels"].to_numpy(dtype=float) if by_loss else np.ones(len(rows))
    arranged = MethodScores(
        names=tuple(trials),
        values=(found / weights if by_loss else found).reshape(len(trials), len(seeds), len(rows)),
        weights=weights,
        groups=pd.factorize(rows["group"])[0].astype(np.int64),
        higher_is_better=is_higher_better(metric),
        is_proportion=is_proportion(metric),
    )
    return ArrangedScores(scores=arranged, seeds=seeds, warnings=tuple(warnings))


def _with_common_seeds(
    trials: dict[str, dict[int, str]],
) -> tuple[dict[str, dict[int, str]], list[str]]:
    """The trials without methods whose missing seeds would take the claim from all others, and a warning for each."""
    short = {name: len(by_seed) for name, by_seed in trials.items() if len(by_seed) < MIN_SEEDS}
    rest = {name: by_seed for name, by_seed in trials.items() if name not in short}
    if not short or len(rest) < 2 or len(_common(rest)) < MIN_SEEDS:
        return trials, []
    words = [
        f"{name}: only {count_of(number, 'seed')} with scores of single test rows; it is not compared"
        for name, number in short.items()
    ]
    return rest, words


def _common(trials: Mapping[str, Mapping[int, str]]) -> tuple[int, ...]:
    sets = [set(by_seed) for by_seed in trials.values()]
    return tuple(sorted(set.intersection(*sets))) if sets else ()


def _pivot(scores: pd.DataFrame, trials: Sequence[str], column: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(Scores: one line per row, one column per trial; labels and group of the rows that every trial has scored)."""
    own = scores[scores["trial_id"].isin(set(trials))]
    own = own.assign(occurrence=own.groupby(["trial_id", "row"], sort=False).cumcount())
    keys = ["row", "occurrence"]
    values = own.pivot(index=keys, columns="trial_id", values=column)
    whole = values.index[values.notna().all(axis="columns")]
    first = own[own["trial_id"] == trials[0]].set_index(keys)
    rows = pd.DataFrame(
        {
            "num_labels": first["num_labels"].reindex(whole),
            "group": (first["group"] if "group" in first else first.index.to_frame()["row"]).reindex(whole),
        }
    )
    return values, rows
