"""A method that is far noisier at its other settings keeps that noise where its few chosen seeds happened to agree."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loragrid.comparison.pairwise import MethodScores, compare_methods
from loragrid.comparison.seed_spread import far_noisier_variances, known_seed_variances
from loragrid.comparison.selection import choose
from loragrid.comparison.table import Comparison
from loragrid.trials.tags import PHASE_TAG
from tests.support.comparisons import made_up_comparison


def rotated(lr: float) -> tuple[float, ...]:
    """Seed effects of variance 1 whose order differs between learning rates."""
    steps = (-1.0, 0.0, 1.0, -1.0, 0.0)
    return steps[round(10 * lr) - 1 :][:3]


def noisy_sweep(**changes: Any) -> Comparison:
    """Three methods, rates and seeds; the seeds of `wild` differ 100 times as much, but not at its best rate."""
    rows = []
    for method, spread in (("calm", 0.001), ("even", 0.001), ("wild", 0.1)):
        for lr, level in ((0.1, 2.0), (0.2, 1.0), (0.3, 2.0)):
            own = 0.001 if (method, lr) == ("wild", 0.2) else spread
            rows += [
                {
                    "method": method,
                    "lr": lr,
                    "seed": seed,
                    "eval/final_loss": level + own * step,
                    "test/loss": level,
                    **changes,
                }
                for seed, step in enumerate(rotated(lr))
            ]
    return made_up_comparison(rows, {"lr": "training.lr", "seed": "seed"})


def test_the_other_settings_show_the_noise_of_the_chosen_one() -> None:
    comparison = noisy_sweep()
    choices = sorted(choose(comparison).choices, key=lambda choice: choice.method)
    assert [choice.setting.values["lr"] for choice in choices] == [0.2] * 3
    known = known_seed_variances(comparison, choices, "test/loss")
    assert known is not None
    assert known == pytest.approx([0, 0, 0.01], rel=0.05)


def test_known_noise_widens_the_intervals_of_its_pairs_only() -> None:
    rng = np.random.default_rng(0)
    fields: dict[str, Any] = {
        "names": ("calm", "even", "wild"),
        "values": rng.normal(0, 0.001, (3, 3, 1)) + rng.normal(0, 0.001, (3, 3, 40)),
        "weights": np.ones(40),
        "groups": np.arange(40),
    }
    without = compare_methods(MethodScores(**fields))
    found = compare_methods(MethodScores(**fields, seed_variances=np.array([0, 0, 0.01])))
    assert found.pairs[0].standard_error == without.pairs[0].standard_error
    for pair in found.pairs[1:]:
        assert pair.standard_error == pytest.approx(np.sqrt(0.01 / 3), rel=0.01)
    assert found.estimates[0] == without.estimates[0].__class__(
        **{**vars(without.estimates[0]), "behind": found.estimates[0].behind}
    )
    assert (found.estimates[2].standard_error or 0) == pytest.approx(np.sqrt(0.01 / 3), rel=0.01)
    assert found.far_noisier == ("wild",)
    assert found.caveats[0].startswith("far more spread over seeds than the others: wild;")
    smaller = compare_methods(MethodScores(**fields, seed_variances=np.array([0, 0, 1e-12])))
    assert [pair.p_value for pair in smaller.pairs] == [pair.p_value for pair in without.pairs]


def figures(*settings: tuple[float, ...]) -> list[dict[int, float]]:
    return [dict(enumerate(values)) for values in settings]


CALM = figures(*[(1.0, 1.1, 1.2), (1.0, 1.2, 1.1), (1.1, 1.2, 1.0), (1.2, 1.0, 1.1), (1.1, 1.0, 1.2)])


def test_single_settings_show_nothing() -> None:
    assert far_noisier_variances([figures((1.0, 2.0, 3.0)), figures((1.0, 1.1, 1.2))]) is None
    assert far_noisier_variances([figures((1.0, 2.0), (1.0, 5.0)), figures((1.0, 1.1), (2.0, 2.1))]) is None
    assert far_noisier_variances([CALM]) is None


def test_one_unstable_setting_is_no_noisy_method() -> None:
    known = far_noisier_variances([CALM, [*CALM[:3], *figures((1.0, 5.0, 9.0), (2.0, 50.0, 9.0))], CALM])
    assert known is not None
    assert known.tolist() == [0, 0, 0]


def test_a_method_with_one_setting_is_only_compared_with() -> None:
    noisy = figures((0.0, 1.0, 2.0), (2.0, 0.0, 1.0), (1.0, 2.0, 0.0))
    known = far_noisier_variances([noisy, CALM[:1], CALM])
    assert known is not None
    assert (known > 0).tolist() == [True, False, False]
    single = far_noisier_variances([noisy[:1], CALM, CALM])
    assert single is not None
    assert single.tolist() == [0, 0, 0]


def test_what_a_seed_does_to_all_methods_is_no_noise() -> None:
    """Without its removal, the shared effect would hide that the last method is far noisier."""
    noisy = figures((0.0, 1.0, 2.0), (2.0, 0.0, 1.0), (1.0, 2.0, 0.0), (0.0, 1.0, 2.0), (1.0, 0.0, 2.0))
    shared = (0.0, 30.0, -10.0)
    moved = [
        [{seed: value + shared[seed] for seed, value in own.items()} for own in settings]
        for settings in (CALM, CALM, noisy)
    ]
    plain, found = far_noisier_variances([CALM, CALM, noisy]), far_noisier_variances(moved)
    assert plain is not None
    assert found is not None
    assert found == pytest.approx(plain)
    assert (found > 0).tolist() == [False, False, True]


def test_contestants_of_one_method_show_their_own_settings() -> None:
    rows = [
        {"method": "lora", "rank": rank, "lr": lr, "seed": seed, "eval/final_loss": 1 + spread * step, "test/loss": 1.0}
        for rank, spread in ((4, 0.001), (8, 0.1))
        for lr in (0.1, 0.2, 0.3)
        for seed, step in enumerate(rotated(lr))
    ]
    comparison = made_up_comparison(rows, {"rank": "method.rank", "lr": "training.lr", "seed": "seed"})
    choices = sorted(choose(comparison, ["rank"]).choices, key=lambda choice: choice.name)
    known = known_seed_variances(comparison, choices, "test/loss")
    assert known is not None
    assert [choice.name for choice in choices] == ["lora rank 4", "lora rank 8"]
    assert known == pytest.approx([0, 0.01], rel=0.05)


def test_fresh_seeds_and_unfinished_trials_show_nothing() -> None:
    comparison = noisy_sweep()
    choices = sorted(choose(comparison).choices, key=lambda choice: choice.method)
    wild = comparison.table["method"] == "wild"
    tags = {trial_id: {PHASE_TAG: "confirm"} for trial_id in comparison.table["trial_id"][wild]}
    confirmed = replace(comparison, tags=tags)
    known = known_seed_variances(confirmed, choices, "test/loss")
    assert known is not None
    assert known.tolist() == [0, 0, 0]
    table = comparison.table.assign(status=["FAILED" if own else "FINISHED" for own in wild])
    failed = replace(comparison, table=table)
    known = known_seed_variances(failed, choices, "test/loss")
    assert known is not None
    assert known.tolist() == [0, 0, 0]


@pytest.mark.parametrize("variances", [np.array([0.0, -1.0]), np.array([0.0, np.nan]), np.array([0.0])])
def test_impossible_seed_variances_are_refused(variances: Any) -> None:
    with pytest.raises(ValueError, match="allowed: one per method, each 0 or more"):
        MethodScores(
            names=("a", "b"),
            values=np.zeros((2, 3, 4)),
            weights=np.ones(4),
            groups=np.arange(4),
            seed_variances=variances,
        )
