"""The verdict makes no claim where nothing differs, in the hardest scenes of `benchmarks/null_simulation`, and broken
versions of it are found out.

Limits are exact limits of a binomial probability (99 %), and the draws derive from the scenes' names, so that a result
repeats. The full form is 5,000 sweeps in every scene: benchmarks/results/null_simulation.md.
"""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import null_simulation
from benchmarks.null_replication import Tally, generator_of, replicate_all
from benchmarks.null_scenes import SCENES, Scene
from benchmarks.null_simulation import clopper_pearson, faults, simulate
from loragrid.comparison import pairwise, seed_spread, variance
from loragrid.comparison.method_scores import MethodScores
from loragrid.comparison.variance import Components, Means, Variance

BY_NAME = {scene.name: scene for scene in SCENES}
HARDEST = (
    "base",
    "10 seeds",
    "one method x10",
    "15 methods, one x10",
    "flat ladder, one x10",
    "16 rows",
    "groups of 1 to 20 rows",
    "accuracy 0.5, 256 rows",
    "heavy-tailed seeds",
    "settings 1, 2, 5, 10, 20, flat, quiet rows, 3 new seeds",
)
NUM_SWEEPS = 700
NUM_BROKEN = 150
"""Broken versions err so often that few sweeps show it."""


@pytest.mark.heavy
@pytest.mark.parametrize("name", HARDEST)
def test_no_more_false_claims_than_promised(name: str) -> None:
    tally = replicate_all(BY_NAME[name], 0, NUM_SWEEPS)
    assert tally.num == NUM_SWEEPS
    assert faults(BY_NAME[name], tally) == []


@pytest.mark.heavy
def test_differences_are_found() -> None:
    """The other side: four seed deviations are found in most sweeps of five seeds, and half a deviation hardly ever."""
    tally = replicate_all(BY_NAME["5 seeds"], 0, 200)
    power = tally.power / tally.shifted
    assert clopper_pearson(round(tally.power[-1]), tally.shifted)[0] > 0.7
    assert (np.diff(power) >= 0).all()


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["base", "2,000 rows", "10 seeds"])
def test_a_verdict_without_the_seed_term_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = variance.total_variance

    def without_seeds(parts: Components, seeds: Any, f: float, num_seeds: int, groups: float) -> Variance:
        return whole(parts, 0 * seeds, f, num_seeds, groups)

    monkeypatch.setattr(pairwise, "total_variance", without_seeds)
    check_found_out(BY_NAME[name])


@pytest.mark.heavy
def test_a_verdict_without_the_row_term_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = variance.total_variance

    def without_rows(parts: Components, seeds: Any, f: float, num_seeds: int, groups: float) -> Variance:
        return whole(replace(parts, rows=0 * parts.rows, cross=0 * parts.cross), seeds, f, num_seeds, groups)

    monkeypatch.setattr(pairwise, "total_variance", without_rows)
    check_found_out(BY_NAME["16 rows"])


@pytest.mark.heavy
def test_a_verdict_that_ignores_groups_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = variance.means_of

    def of_single_rows(scores: MethodScores) -> Means:
        return whole(replace(scores, groups=np.arange(len(scores.groups))))

    monkeypatch.setattr(pairwise, "means_of", of_single_rows)
    check_found_out(BY_NAME["groups of 1 to 20 rows"])


@pytest.mark.heavy
def test_pooled_seeds_with_one_noisy_method_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def pooled(pairs: Components, num_seeds: int, num_methods: int) -> tuple[Any, float]:
        return np.full_like(pairs.seeds, pairs.seeds.mean()), (num_methods - 1) * (num_seeds - 1)

    monkeypatch.setattr(pairwise, "moderated", pooled)
    monkeypatch.setattr(seed_spread, "FAR_NOISIER", np.inf)
    scene = replace(BY_NAME["one of 10 x10, quiet rows"], limit="")
    assert faults(scene, replicate_all(scene, 0, NUM_BROKEN)) != []


def check_found_out(scene: Scene) -> None:
    tally = replicate_all(scene, 0, NUM_BROKEN)
    assert any("false claims" in fault for fault in faults(scene, tally)), tally


def test_the_limits_are_clopper_and_pearsons() -> None:
    for count, num in ((0, 50), (3, 50), (50, 50), (250, 5000)):
        exact = stats.binomtest(count, num).proportion_ci(0.99, "exact")
        assert clopper_pearson(count, num) == pytest.approx((exact.low, exact.high))


def tally_of(num: int, **fields: Any) -> Tally:
    sums = {"joint": num, "own": float(num), "bounds": num, "alone": np.full(3, float(num)), **fields}
    return Tally(num=num, together=np.full(3, float(num)), **sums)


@pytest.mark.parametrize(
    ("fields", "limit", "words"),
    [
        ({"false": 310}, "", "false claims in 0.062, surely more than 0.05"),
        ({"false": 280}, "", ""),
        ({"false": 310}, "some limit", ""),
        ({"false": 650}, "some limit", "false claims in 0.130, surely more than 0.11"),
        ({"alone": np.full(3, 4550.0)}, "", "intervals of one pair cover 0.910, surely less than 0.93"),
        ({"alone": np.full(3, 4640.0)}, "", ""),
        ({"joint": 4400}, "", "all intervals cover in 0.880, surely less than 0.9"),
        ({"refused": 5000}, "", ""),
    ],
)
def test_criteria_are_broken_beyond_chance_only(fields: dict[str, Any], limit: str, words: str) -> None:
    assert faults(Scene(name="made up", limit=limit), tally_of(5000, **fields)) == ([words] if words else [])


def test_draws_derive_from_the_name() -> None:
    base = Scene(name="base")
    assert generator_of(base, 3).random() == generator_of(base, 3).random()
    others = [generator_of(base, 4), generator_of(base, 3, "test"), generator_of(Scene(name="other"), 3)]
    assert len({generator_of(base, 3).random(), *(other.random() for other in others)}) == 4


def test_names_of_scenes_are_unique() -> None:
    assert len(BY_NAME) == len(SCENES)


@pytest.mark.heavy
def test_sums_do_not_depend_on_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(null_simulation, "PER_TASK", 3)
    scenes = [BY_NAME["2 methods"], BY_NAME["16 rows"]]
    alone = {scene.name: tally for scene, tally in simulate(scenes, 8, 1)}
    shared = {scene.name: tally for scene, tally in simulate(scenes, 8, 2)}
    for name, tally in alone.items():
        assert (tally.num, tally.false, tally.joint) == (8, shared[name].false, shared[name].joint)
        assert tally.alone.tolist() == shared[name].alone.tolist()


@pytest.mark.heavy
def test_the_script_writes_a_page_and_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "null.md"
    code = null_simulation.main(
        ["--replications", "5", "--processes", "1", "--scenes", "against", "9", "--out", str(page)]
    )
    assert code == 0
    text = page.read_text(encoding="utf-8")
    wanted = [scene.name for scene in SCENES if "against" in scene.name and "9" in scene.name]
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == wanted
    assert f"Criteria: all {len(wanted)} scenes pass." in text
    with page.with_suffix(".csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["scene"] for row in rows] == wanted
    assert {row["num"] for row in rows} == {"5"}
    with pytest.raises(SystemExit):
        null_simulation.main(["--scenes", "no such scene"])
    assert "no scene contains no such scene" in capsys.readouterr().err
