"""Chooses every method's best setting by its figures on evaluation rows, so that tuned methods are compared.

The setting with the best mean over its seeds wins. Three rules reduce the influence of chance. A setting cannot win if
one of its trials diverged or was stopped early. A setting that lacks seeds (a worker died, the sweep still runs) cannot
win against one that has them. The figures on test rows are never used for the choice.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loragrid.comparison.choice import Choice, Selection, reported_summary, summarize
from loragrid.comparison.confirmation import confirmed
from loragrid.comparison.phases import split_phases
from loragrid.comparison.ranking import holds, is_higher_better, metric_words, ranking_metric, test_metrics
from loragrid.comparison.settings import (
    TASK_SECTIONS,
    Row,
    Setting,
    figure_in,
    rows_by_setting,
    seed_of,
    setting_of,
    show_setting,
    varying_within,
)
from loragrid.comparison.table import Comparison, plain_value
from loragrid.comparison.tuning import default_setting, edge_sides, ladder_axes
from loragrid.formatting import format_value, is_missing
from loragrid.tracking.store_uri import Scalar
from loragrid.trials.outcome import DIVERGED, STOPPED_EARLY


def check_apart(comparison: Comparison, apart: Collection[str]) -> None:
    """Check that every name is an axis that can split methods into contestants.

    Raises:
        ValueError: a name is no axis, or is an axis of seeds or tasks.
    """
    fixed = ("seed", *TASK_SECTIONS)
    names = [name for name, path in comparison.axes.items() if not path.startswith(fixed)]
    for name in apart:
        if name not in names:
            raise ValueError(f"apart: {name!r} is no axis of this sweep; allowed: {', '.join(names) or 'none'}")


def choose(comparison: Comparison, apart: Collection[str] = ()) -> Selection:
    """Every method's best setting by its mean evaluation figure over seeds, see `ranking_metric`.

    apart: axes (columns of the table) that split a method into contestants, one per value, such as `rank` to compare
    methods at equal ranks. The lower evaluation loss breaks ties, then the order of the table.

    A best value is not at the edge of its ladder if the next value diverged or was stopped early; it is at the edge if
    the next value is missing. `tuning` defines ladders and defaults.

    Raises:
        ValueError: `apart` names no axis, or the sweep has several tasks (`tasks_of` separates them).
    """
    check_apart(comparison, apart)
    comparison, confirm = split_phases(comparison)
    tasks = [f"{name} ({path})" for name, path in comparison.axes.items() if path.startswith(TASK_SECTIONS)]
    if tasks:
        raise ValueError(f"the sweep varies {', '.join(tasks)}: losses on different tasks; allowed: one at a time")
    metric = ranking_metric(comparison.table)
    judged, unconfirmed = _judged_part(comparison, confirm, apart)
    reported = next((key for key in test_metrics() if holds(judged.table, key)), metric)
    contestants: dict[tuple[Any, ...], list[_Candidate]] = {}
    groups = rows_by_setting(comparison)
    split = {method: varying_within(comparison, groups, method) for method in {rows[0]["method"] for rows in groups}}
    for rows in groups:
        method = rows[0]["method"]
        own = {name: plain_value(rows[0][name]) for name in split[method] if name in apart}
        candidate = _candidate(comparison, rows, split[method], metric)
        contestants.setdefault((method, *own.items()), []).append(candidate)
    choices: list[Choice] = []
    references: list[Choice] = []
    warnings: list[str] = []
    for (_, *own_apart), candidates in contestants.items():
        choice, words = _choose_one(comparison, candidates, dict(own_apart), metric, reported)
        warnings += words
        if choice is None:
            continue
        if _trains_nothing(candidates):
            references.append(choice)
            continue
        if confirm is not None and judged is confirm and reported in test_metrics():
            choice = confirmed(choice, confirm, reported)
        warnings += _missing_tests(choice, reported)
        choices.append(choice)
    warnings += unconfirmed
    if reported == metric and any(choice.num_settings > 1 for choice in choices):
        warnings.append(
            "there are no test rows (data.num_test): the settings were chosen on the evaluation rows that are "
            "reported, which flatters them"
        )
    return Selection(
        metric=metric,
        reported=reported,
        choices=tuple(sorted(choices, key=lambda choice: _order(choice, reported))),
        references=tuple(references),
        warnings=tuple(warnings),
    )


def _judged_part(tuned: Comparison, confirm: Comparison | None, apart: Collection[str]) -> tuple[Comparison, list[str]]:
    """The trials whose figures are compared, and a warning if there are fresh seeds that cannot be used."""
    if confirm is None:
        return tuned, []
    if apart:
        why = f"{', '.join(apart)}: the fresh seeds confirmed one setting per method, so contestants"
    elif not any(holds(confirm.table, key) for key in test_metrics()) and any(
        holds(tuned.table, key) for key in test_metrics()
    ):
        why = "no trial with a fresh seed has a test figure yet (--resume continues the sweep), so methods"
    else:
        return confirm, []
    return tuned, [f"{why} are compared on the seeds that tuned them"]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A setting that could be chosen. figures: seed -> evaluation figure, for trials that have one. seeds: all."""

    setting: Setting
    rows: Sequence[Row]
    figures: Mapping[int, float]
    seeds: frozenset[int]

    @property
    def fault(self) -> str:
        """Why the setting cannot win, whatever the figures of its other seeds; "" if it can win."""
        reasons = [str(row["reason"] or "") for row in self.rows]
        if any(reason.startswith(DIVERGED) for reason in reasons):
            return "diverged"
        return "was stopped early" if any(reason.startswith(STOPPED_EARLY) for reason in reasons) else ""

    def order(self, metric: str) -> tuple[float, float]:
        """Sort key: the best mean first, then the lowest loss."""
        mean = sum(self.figures.values()) / len(self.figures)
        loss = [figure_in(row, "eval/final_loss") for row in self.rows if row["status"] == "FINISHED"]
        present = [value for value in loss if value is not None]
        tie = sum(present) / len(present) if present else math.inf
        return (-mean if is_higher_better(metric) else mean, tie)


def _candidate(comparison: Comparison, rows: Sequence[Row], names: Sequence[str], metric: str) -> _Candidate:
    setting = setting_of(comparison, rows, names)
    by_trial = {row["trial_id"]: figure_in(row, metric) for row in rows if row["status"] == "FINISHED"}
    figures = {seed: by_trial.get(trial_id) for seed, trial_id in setting.trial_ids.items()}
    return _Candidate(
        setting=setting,
        rows=rows,
        figures={seed: value for seed, value in figures.items() if value is not None},
        seeds=frozenset(seed_of(comparison, row) for row in rows),
    )


def _choose_one(
    comparison: Comparison, candidates: Sequence[_Candidate], apart: Mapping[str, Scalar], metric: str, reported: str
) -> tuple[Choice | None, list[str]]:
    """The best of one contestant's settings (None if none can be chosen), and warnings about the choice."""
    method = candidates[0].setting.method
    name = " ".join([method, *(f"{axis} {format_value(value)}" for axis, value in apart.items())])
    num_seeds = len(frozenset().union(*(candidate.seeds for candidate in candidates)))
    sound = [candidate for candidate in candidates if candidate.figures and not candidate.fault]
    if not sound:
        faults = sorted({candidate.fault for candidate in candidates if candidate.fault})
        why = "none of its trials has finished"
        if faults:
            why = f"each of its settings has a trial that {' or '.join(faults)}"
        return None, [f"{name}: no setting can be chosen: {why}"]
    num_finished = max(len(candidate.figures) for candidate in sound)
    best = min(
        (candidate for candidate in sound if len(candidate.figures) == num_finished),
        key=lambda candidate: candidate.order(metric),
    )
    warnings: list[str] = []
    if num_finished < num_seeds:
        warnings.append(
            f"{name}: no setting has finished on all {num_seeds} seeds; chosen among those with {num_finished}"
        )
    warnings += _passed_over(name, candidates, best, metric)
    tried = [candidate.setting for candidate in candidates if candidate.figures or candidate.fault]
    sides = edge_sides(best.setting, tried, ladder_axes(comparison, method))
    default = _default_of(comparison, candidates, best)
    fault = ""
    if default is not None and (default.fault or not default.figures):
        fault = f"one of its trials {default.fault}" if default.fault else "none of its trials has finished"
        warnings.append(f"{name}: its default is {show_setting(default.setting)}: {fault}")
    choice = replace(
        _as_choice(best, apart, metric, reported, len(candidates)),
        edges={axis: best.setting.values[axis] for axis in sides},
        edge_sides=sides,
        default=_as_choice(default, apart, metric, reported, len(candidates)) if default and default.figures else None,
        default_fault=fault,
    )
    return choice, warnings


def _passed_over(name: str, candidates: Sequence[_Candidate], best: _Candidate, metric: str) -> list[str]:
    """A warning for every setting that looks better than the best one but may not win."""
    warnings = []
    for candidate in candidates:
        if candidate.figures and candidate.order(metric) < best.order(metric):
            fault = f"one of its trials {candidate.fault}" if candidate.fault else "the others are missing"
            warnings.append(
                f"{name}: {show_setting(candidate.setting)} looks better on {len(candidate.figures)} of "
                f"{len(candidate.seeds | best.seeds)} seeds, but {fault}: it is not chosen"
            )
    return warnings


def _default_of(comparison: Comparison, candidates: Sequence[_Candidate], best: _Candidate) -> _Candidate | None:
    """The candidate with the method's default setting; None if it is not among them."""
    method = best.setting.method
    settings = [candidate.setting for candidate in candidates]
    wanted = default_setting(settings, best.setting, comparison.axes, comparison.methods.get(method, method))
    return next((candidate for candidate in candidates if candidate.setting == wanted), None)


def _missing_tests(choice: Choice, reported: str) -> list[str]:
    """A warning if some or all of the choice's trials lack the reported figure."""
    if reported not in test_metrics():
        return []
    if choice.test is None:
        fresh = " with fresh seeds" if choice.is_confirmed else ""
        return [f"{choice.name}: none of its trials{fresh} has a {metric_words(reported)}; it is not compared"]
    if choice.test.num < len(choice.reported_trials):
        have = f"{choice.test.num} of its {len(choice.reported_trials)} trials have"
        return [f"{choice.name}: {have} a {metric_words(reported)}"]
    return []


def _as_choice(
    candidate: _Candidate, apart: Mapping[str, Scalar], metric: str, reported: str, num_settings: int
) -> Choice:
    by_trial = {row["trial_id"]: row for row in candidate.rows}
    trials = {seed: candidate.setting.trial_ids[seed] for seed in candidate.figures}
    tests = [figure_in(by_trial[trial_id], reported) for trial_id in trials.values()]
    present = [value for value in tests if value is not None]
    return Choice(
        method=candidate.setting.method,
        setting=candidate.setting,
        metric=metric,
        evaluation=summarize(list(candidate.figures.values())),
        test=summarize(present) if present and reported in test_metrics() else None,
        reported_trials=trials,
        edges={},
        num_settings=num_settings,
        apart=apart,
    )


def _trains_nothing(candidates: Sequence[_Candidate]) -> bool:
    """Whether a method has no trainable parameters; its figures are those of the base and serve as a reference."""
    counts = [row.get("parameters/trainable") for candidate in candidates for row in candidate.rows]
    present = [count for count in counts if not is_missing(count)]
    return bool(present) and not any(present)


def _order(choice: Choice, reported: str) -> float:
    summary = reported_summary(choice, reported)
    if summary is None:
        return math.inf
    return -summary.mean if is_higher_better(reported) else summary.mean
