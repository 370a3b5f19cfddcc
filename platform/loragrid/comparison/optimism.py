"""Estimates by how much a chosen setting's figure owes to the luck of the seeds that chose it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loragrid.comparison.choice import Choice, Selection
from loragrid.comparison.ranking import is_higher_better
from loragrid.comparison.settings import Row, rows_by_setting, seed_of
from loragrid.comparison.table import Comparison, plain_value
from loragrid.formatting import is_missing
from loragrid.trials.outcome import DIVERGED, STOPPED_EARLY

FEWEST_SEEDS = 3
"""With two seeds a choice would rest on a single one."""


@dataclass(frozen=True, kw_only=True)
class Optimism:
    """How much better a choice's reported figure is than the figure on seeds that did not choose.

    value: in the unit of the reported metric; positive if the reported figure flatters the method, whether higher or
    lower is better. num_seeds: the seeds that were left out in turn. num_settings: the settings that could be chosen.
    """

    value: float
    num_seeds: int
    num_settings: int


def optimism_of(comparison: Comparison, selection: Selection) -> dict[str, Optimism | None]:
    """The optimism of every choice, by its name; None where it cannot be computed.

    Each seed is left out in turn: the setting is chosen by the mean evaluation figure over the other seeds, and scored
    with its reported figure on the seed left out. The optimism is the mean of these scores minus the reported mean
    (for a metric of which more is better: the reported mean minus that of the scores).

    The estimate is unbiased, but it is no test: the choices share seeds, so its own spread is understated. Only
    settings with an evaluation and a reported figure on every seed of the choice take part, and none with a trial that
    diverged or was stopped early, as in `choose`. It cannot be computed for fewer than three seeds or two settings.

    comparison: the trials among which `selection` has chosen.
    """
    return {choice.name: _optimism(comparison, choice, selection) for choice in selection.choices}


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """One setting's figures by seed. loss: breaks ties of the evaluation figure, infinite if it was not measured."""

    evaluation: Mapping[int, float]
    loss: Mapping[int, float]
    reported: Mapping[int, float]


def _optimism(comparison: Comparison, choice: Choice, selection: Selection) -> Optimism | None:
    own = [rows for rows in rows_by_setting(comparison) if rows[0]["method"] == choice.method]
    own = [rows for rows in own if all(plain_value(rows[0][axis]) == value for axis, value in choice.apart.items())]
    values = choice.setting.values
    chosen = next((rows for rows in own if all(plain_value(rows[0][axis]) == values[axis] for axis in values)), None)
    if chosen is None:
        return None
    best = _tried(comparison, chosen, selection)
    seeds = sorted(best.evaluation.keys() & best.reported.keys())
    candidates = [_tried(comparison, rows, selection) for rows in own if not _has_fault(rows)]
    candidates = [one for one in candidates if {*seeds} <= one.evaluation.keys() & one.reported.keys()]
    if len(seeds) < FEWEST_SEEDS or len(candidates) < 2:
        return None
    scores = []
    for left_out in seeds:
        others = [seed for seed in seeds if seed != left_out]
        winner = min(candidates, key=lambda one: _order(one, others, selection.metric))
        scores.append(winner.reported[left_out])
    difference = _mean(scores) - _mean([best.reported[seed] for seed in seeds])
    value = -difference if is_higher_better(selection.reported) else difference
    return Optimism(value=value, num_seeds=len(seeds), num_settings=len(candidates))


def _order(one: _Tried, seeds: Sequence[int], metric: str) -> tuple[float, float]:
    """Sort key over some seeds: the best mean first, then the lowest loss."""
    mean = _mean([one.evaluation[seed] for seed in seeds])
    return (-mean if is_higher_better(metric) else mean, _mean([one.loss.get(seed, math.inf) for seed in seeds]))


def _tried(comparison: Comparison, rows: Sequence[Row], selection: Selection) -> _Tried:
    def figures(key: str) -> dict[int, float]:
        found: dict[int, Any] = {seed_of(comparison, row): row.get(key) for row in rows if row["status"] == "FINISHED"}
        return {seed: float(value) for seed, value in found.items() if not is_missing(value) and math.isfinite(value)}

    return _Tried(
        evaluation=figures(selection.metric),
        loss=figures("eval/final_loss"),
        reported=figures(selection.reported),
    )


def _has_fault(rows: Sequence[Row]) -> bool:
    return any(str(row["reason"] or "").startswith((DIVERGED, STOPPED_EARLY)) for row in rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
