"""One replication of `null_simulation`: a sweep is drawn, the product judges it, and its claims are checked."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.null_model import (
    Floats,
    draw_seeds,
    evaluation_figures,
    expected_figures,
    seed_scale,
    test_scores,
)
from benchmarks.null_scenes import Scene
from loragrid.comparison import pairwise
from loragrid.comparison.choice import Choice
from loragrid.comparison.claims import Claim, claims_of
from loragrid.comparison.pairwise import ALL_PAIRS, Family, MethodComparison, MethodEstimate, MethodScores
from loragrid.comparison.seed_spread import known_seed_variances
from loragrid.comparison.selection import choose
from loragrid.comparison.table import NO_CURVES, Comparison
from loragrid.comparison.verdict import Verdict, judge
from loragrid.tasks.discovery import figure_of
from loragrid.trials.tags import PHASE_TAG

SHIFTS = (0.5, 1.0, 2.0, 4.0)
"""True differences, in seed deviations, for which the power is measured."""
POWER_EVERY = 5
"""Power is measured in one of so many replications, because it needs four further comparisons."""
FIRST_FRESH_SEED = 1000
JUDGE_EVERY = 100
"""In one of so many replications the whole `verdict.judge` is run, too, and must make the same claims."""
EQUAL = 1e-12


@dataclass(kw_only=True)
class Tally:
    """Sums over replications. Arrays of pairs are in the order of `itertools.combinations`.

    tested: replications in which a test showed a difference wrongly: there is none, or it has the other sign.
    false: those in which the verdict claims it; it does not claim what tuning may have made (`claims.Claim.mark`).
    warned: false ones with a caveat beside the verdict. flagged: a far noisier method was named.
    refused: nothing could be claimed. alone, together (P,): the interval of this pair alone, or of the family, is
    right. joint: all intervals of the family are right. own: methods' intervals right, as a share.
    bounds: all bounds of being behind the best are right. lost: a best method is not in the best group.
    shifted: replications for which power was measured; power: pairs with the shifted method that are shown, as a share.
    """

    num: int = 0
    tested: int = 0
    false: int = 0
    warned: int = 0
    flagged: int = 0
    refused: int = 0
    joint: int = 0
    bounds: int = 0
    lost: int = 0
    own: float = 0.0
    alone: Floats = field(default_factory=lambda: np.zeros(0))
    together: Floats = field(default_factory=lambda: np.zeros(0))
    shifted: int = 0
    power: Floats = field(default_factory=lambda: np.zeros(len(SHIFTS)))

    def __add__(self, other: "Tally") -> "Tally":
        if not self.num:
            return other
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in self.__dict__})


def generator_of(scene: Scene, *path: object) -> np.random.Generator:
    """A generator whose seed is a digest of the scene's name, so that no seed is chosen."""
    digest = hashlib.sha256("/".join([scene.name, *map(str, path)]).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


@dataclass(frozen=True, kw_only=True)
class Sweeps:
    """Builds the recorded sweep of a scene as the product's table; trial ids are `METHOD-RATE-SEED` as indices."""

    scene: Scene

    @cached_property
    def trials(self) -> NDArray[np.int64]:
        """(T, 3): method, rate and seed of every trial."""
        scene = self.scene
        tried = scene.settings or (len(scene.ladder),) * scene.num_methods
        return np.array([(m, r, s) for m, num in enumerate(tried) for r in range(num) for s in range(scene.num_seeds)])

    @cached_property
    def columns(self) -> dict[str, Any]:
        method, rate, seed = self.trials.T
        return {
            "trial_id": [f"{m}-{r}-{s}" for m, r, s in self.trials.tolist()],
            "status": ["FINISHED"] * len(method),
            "method": [f"m{m}" for m in method.tolist()],
            "lr": (10.0 ** (rate - len(self.scene.ladder))).tolist(),
            "seed": pd.array(seed, dtype="Int64"),
            "reason": [""] * len(method),
            "run_id": [f"run-{i}" for i in range(len(method))],
        }

    def comparison(self, figures: Floats, losses: Floats) -> Comparison:
        """figures, losses (M, L, S). The test figures, which choose nothing, are placeholders."""
        at = tuple(self.trials.T)
        metrics: dict[str, Any] = {"eval/final_loss": losses[at]}
        if self.scene.accuracy is not None:
            metrics["eval/accuracy"] = figures[at]
        reported = "test/loss" if self.scene.accuracy is None else "test/accuracy"
        table = pd.DataFrame({**self.columns, **metrics, reported: np.zeros(len(self.trials))})
        return Comparison(
            experiment_name="null",
            sweep="drawn",
            question="",
            tracking_uri="",
            experiment_id="0",
            sweep_run_id="",
            axes={"lr": "training.lr", "seed": "seed"} if len(self.scene.ladder) > 1 else {"seed": "seed"},
            table=table,
            curves=NO_CURVES,
        )

    def chosen(self, comparison: Comparison) -> tuple[tuple[Choice, ...], Floats | None]:
        """(The product's choices in the order of the methods, the seed variances that it knows)."""
        selection = choose(comparison)
        choices = tuple(sorted(selection.choices, key=lambda choice: int(choice.method[1:])))
        return choices, known_seed_variances(comparison, choices, selection.reported)

    def recorded(
        self,
        comparison: Comparison,
        choices: Sequence[Choice],
        values: Floats,
        weights: Floats,
        groups: NDArray[np.int64],
    ) -> tuple[Comparison, pd.DataFrame]:
        """The sweep as MLflow holds it: its table with test figures, and the chosen trials' scores of single rows."""
        scene, figure = self.scene, figure_of("test/accuracy")
        reported = "test/loss" if scene.accuracy is None else "test/accuracy"
        column = "loss" if figure is None or scene.accuracy is None else str(figure.column)
        table = comparison.table.set_index("trial_id", drop=False)
        tags: dict[str, dict[str, str]] = {}
        parts = []
        for choice, of_method in zip(choices, values, strict=True):
            trial_ids = list(choice.reported_trials.values())
            if scene.fresh_seeds:
                again = table.loc[trial_ids[:1]].loc[np.repeat(trial_ids[0], scene.fresh_seeds)]
                trial_ids = [f"{trial_ids[0]}-confirmed-{seed}" for seed in range(scene.fresh_seeds)]
                again = again.assign(trial_id=trial_ids, seed=FIRST_FRESH_SEED + np.arange(scene.fresh_seeds))
                table = pd.concat([table, again.astype(table.dtypes).set_index("trial_id", drop=False)])
                tags |= {trial_id: {PHASE_TAG: "confirm"} for trial_id in trial_ids}
            for trial_id, figures in zip(trial_ids, of_method, strict=True):
                table.loc[trial_id, reported] = figures @ weights / weights.sum()
                rows = {"trial_id": trial_id, "row": [f"{i:016x}" for i in range(len(weights))], "num_labels": weights}
                own = figures * weights if column == "loss" else figures
                parts.append(pd.DataFrame({**rows, column: own, "group": [f"{group:016x}" for group in groups]}))
        parameters = {"verdict.family": "all_pairs"}
        if scene.against is not None:
            parameters = {"verdict.family": "against", "verdict.against": f"m{scene.against}"}
        table = table.reset_index(drop=True)
        return replace(comparison, table=table, tags=tags, sweep_parameters=parameters), pd.concat(parts)


def check_same(verdict: Verdict, claims: Sequence[Claim]) -> None:
    """Check that `verdict.judge` makes the same claims about a recorded sweep as the shorter way of the simulation."""
    assert verdict.result is not None
    if verdict.result.refusal:
        return
    for claim in claims:
        found = verdict.claim(claim.better, claim.worse)
        assert found is not None
        assert (found.better, found.is_shown, found.mark) == (claim.better, claim.is_shown, claim.mark)
        assert math.isclose(found.test.p_adjusted or 1, claim.test.p_adjusted or 1, rel_tol=1e-6)


def rates_of(choices: Sequence[Choice]) -> NDArray[np.int64]:
    """(M,): the index of the chosen learning rate, from the ids of the trials."""
    return np.array([int(next(iter(choice.setting.trial_ids.values())).split("-")[1]) for choice in choices])


def family_of(scene: Scene) -> Family:
    return ALL_PAIRS if scene.against is None else Family(kind="against", against=f"m{scene.against}")


def as_scores(
    scene: Scene, values: Floats, weights: Floats, groups: NDArray[np.int64], known: Floats | None
) -> MethodScores:
    return MethodScores(
        names=tuple(f"m{m}" for m in range(scene.num_methods)),
        values=values,
        weights=weights,
        groups=groups,
        higher_is_better=scene.accuracy is not None,
        is_proportion=scene.accuracy is not None,
        seed_variances=known,
    )


def replicate(scene: Scene, index: int, sweeps: Sweeps, truth: Floats) -> Tally:
    """One sweep from its draw to the check of its claims. truth: `expected_figures` of the scene."""
    rng = generator_of(scene, index)
    seeds = draw_seeds(scene, rng, scene.num_seeds)
    comparison = sweeps.comparison(*evaluation_figures(scene, rng, seeds))
    choices, known = sweeps.chosen(comparison)
    rates = rates_of(choices)
    if scene.fresh_seeds:
        seeds = draw_seeds(scene, rng, scene.fresh_seeds)
        choices = tuple(replace(choice, is_confirmed=True) for choice in choices)

    def judged(shift: float) -> tuple[MethodComparison, tuple[Claim, ...]]:
        drawn = test_scores(scene, generator_of(scene, index, "test"), seeds, rates, shift)
        result = pairwise.compare_methods(as_scores(scene, *drawn, known), family_of(scene))
        return result, claims_of(result, choices, scene.accuracy is not None)

    result, claims = judged(0.0)
    if index % JUDGE_EVERY == 0:
        drawn = test_scores(scene, generator_of(scene, index, "test"), seeds, rates, 0.0)
        check_same(judge(*sweeps.recorded(comparison, choices, *drawn)), claims)
    tally = check(result, claims, truth[np.arange(scene.num_methods), rates])
    if index % POWER_EVERY == 0:
        tally.shifted = 1
        for i, shift in enumerate(SHIFTS):
            claims = judged(shift * seed_scale(scene))[1]
            tally.power[i] = found_worse(claims, f"m{scene.num_methods - 1}")
    return tally


def found_worse(claims: Sequence[Claim], name: str) -> float:
    """The share of the method's pairs in the family in which it is shown to be worse."""
    own = [claim for claim in claims if claim.test.in_family and name in (claim.better, claim.worse)]
    return float(np.mean([claim.is_shown and claim.worse == name for claim in own]))


def check(found: MethodComparison, claims: Sequence[Claim], expected: Floats) -> Tally:
    """Compare claims and intervals with the truth. expected (M,): the methods' expected figures."""
    first, second = np.triu_indices(len(expected), 1)
    true = expected[first] - expected[second]
    true[np.abs(true) < EQUAL] = 0
    wrong = [claim for claim, d in zip(claims, true, strict=True) if claim.test.difference * d <= 0]
    false = any(claim.is_shown for claim in wrong)
    low, high = np.array([(pair.low, pair.high) for pair in found.pairs]).T
    pair_low, pair_high = np.array([(pair.pair_low, pair.pair_high) for pair in found.pairs]).T
    together = (low - EQUAL <= true) & (true <= high + EQUAL)
    in_family = np.array([pair.in_family for pair in found.pairs])
    higher = found.pairs[0].higher_is_better
    behind = expected.max() - expected if higher else expected - expected.min()
    best = {estimate.name for estimate, gap in zip(found.estimates, behind, strict=True) if gap < EQUAL}
    return Tally(
        num=1,
        tested=int(any(claim.test.is_shown for claim in wrong)),
        false=int(false),
        warned=int(false and bool(found.caveats)),
        flagged=int(bool(found.far_noisier)),
        refused=int(bool(found.refusal)),
        joint=int(together[in_family].all()),
        bounds=int(all(_is_bound(*pair) for pair in zip(found.estimates, behind, strict=True))),
        lost=int(not best <= set(found.best_group)),
        own=float(np.mean([_covers(*pair) for pair in zip(found.estimates, expected, strict=True)])),
        alone=((pair_low - EQUAL <= true) & (true <= pair_high + EQUAL)).astype(float),
        together=together.astype(float),
    )


def _is_bound(estimate: MethodEstimate, gap: float) -> bool:
    return estimate.behind is None or gap <= estimate.behind + EQUAL


def _covers(estimate: MethodEstimate, expected: float) -> bool:
    return estimate.low is None or estimate.high is None or estimate.low <= expected <= estimate.high


def replicate_all(scene: Scene, start: int, stop: int) -> Tally:
    """The sum over the replications with the indices start to stop - 1."""
    sweeps, truth, total = Sweeps(scene=scene), expected_figures(scene), Tally()
    for index in range(start, stop):
        total = total + replicate(scene, index, sweeps, truth)
    return total
