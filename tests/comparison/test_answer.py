"""The answer of a verdict: what it recommends, what it leaves open, and what it does not claim."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from loragrid.comparison.findings import best_mean
from loragrid.comparison.verdict import judge, trial_to_keep
from loragrid.trials.tags import PHASE_TAG
from tests.support.judged_sweeps import (
    CLEAR,
    THREE_SEEDS,
    comparison_of,
    costed,
    judged,
    scores_of,
)


def test_the_cheapest_within_the_margin_is_taken() -> None:
    comparison = costed(CLEAR, lora=1000, lora_plus=400, vera=10)
    verdict = judge(comparison, scores_of(comparison, noise=0.001))
    assert verdict.answer.recommended == "lora_plus"
    assert verdict.answer.behind == ("vera",)
    assert verdict.sentences[0].startswith(
        "Take lora_plus, the cheapest by parameters: not told apart from lora, with 40 % of the parameters and 40 % of "
        "the memory of lora; at most "
    )
    assert verdict.sentences[0].endswith("behind the best (95 %, new seeds and new rows). Behind it: vera.")


def test_low_power_never_recommends_a_cheaper_method() -> None:
    noisy: dict[tuple[str, float], Sequence[float]] = {
        ("lora", 1e-3): [2.3, 2.5, 2.2],
        ("lora_plus", 1e-3): [2.4, 2.2, 2.5],
    }
    comparison = costed(noisy, lora=1000, lora_plus=10)
    verdict = judge(comparison, scores_of(comparison))
    bound = max(estimate.behind or 0.0 for estimate in verdict.result.estimates)  # type: ignore[union-attr]
    assert bound > verdict.margin
    assert verdict.answer.recommended == ""
    assert verdict.sentences[0].startswith("No method is shown to be the best. lora has the lowest test loss")
    assert "seeds would" in verdict.sentences[0] or "more than 50 seeds" in verdict.sentences[0]


def test_the_best_is_taken_where_it_beats_every_other() -> None:
    figures = {("lora", 1e-3): [2.30, 2.32, 2.31], ("vera", 1e-3): [2.6, 2.62, 2.60], ("dora", 1e-3): [2.8, 2.82, 2.83]}
    comparison = costed(figures, lora=5000, vera=10)
    verdict = judge(comparison, scores_of(comparison))
    assert verdict.sentences[0] == "Take lora: better than every other compared method."


def test_a_whole_model_is_a_reference_and_never_taken() -> None:
    figures = {("full", 1e-3): [2.300, 2.301, 2.302], ("lora", 1e-3): [2.301, 2.302, 2.301], ("vera", 1e-3): [2.9] * 3}
    comparison = costed(figures, full=100_000, lora=4000)
    verdict = judge(comparison, scores_of(comparison, noise=0.001))
    reason = "which has the lowest test loss of the adapters"
    assert verdict.sentences[0].startswith(f"Take lora, {reason}: not told apart from full, with 4 % of the parameters")
    ahead = costed({**figures, ("full", 1e-3): [2.0] * 3}, full=100_000, lora=4000)
    far = judge(ahead, scores_of(ahead))
    assert far.answer.recommended == "lora"
    assert far.sentences[0].endswith("Behind it: vera.")
    assert "better than every other adapter, and behind full by 0.2995" in far.sentences[0]
    # A record without the tag is recognised by its size.
    untagged = replace(comparison, tags={})
    untagged.table["memory/base_bytes"] = 4.0 * 100_000
    assert judge(untagged, scores_of(comparison, noise=0.001)).answer.recommended == "lora"


def test_an_undecided_answer_ranks_adapters_below_a_whole_model() -> None:
    figures: dict[tuple[str, float], Sequence[float]] = {
        ("full", 1e-3): [2.000, 2.001, 2.002],
        ("lora", 1e-3): [2.3, 2.5, 2.25],
        ("dora", 1e-3): [2.4, 2.3, 2.5],
    }
    comparison = costed(figures, full=100_000, lora=4000, dora=4100)
    sentence = judge(comparison, scores_of(comparison, noise=0.001)).sentences[0]
    assert sentence.startswith("No adapter is shown to be the best. Of the adapters, lora has the lowest test loss")
    assert "; not told apart from dora;" in sentence or "; not told apart from full and dora;" in sentence
    near = costed({**figures, ("full", 1e-3): [2.34, 2.36, 2.35], ("dora", 1e-3): [3.4, 3.3, 3.5]}, full=100_000)
    alone = judge(near, scores_of(near, noise=0.001)).sentences[0]
    assert "not told apart from full" in alone
    assert "behind the best (95 %, new seeds and new rows)" in alone


def test_a_lead_of_many_settings_against_one_is_no_claim() -> None:
    many = {("lora", 1e-3 * 2**i): [2.3 + 0.1 * i + 0.001 * s for s in range(3)] for i in range(5)}
    few = {("vera", 1e-3): [2.8, 2.802, 2.801]}
    verdict = judged({**many, **few})
    (claim,) = verdict.claims
    assert claim.test.is_shown
    assert (claim.is_shown, claim.is_marked) == (False, True)
    assert any("5 settings against 1 can make such a lead by luck. Fresh" in text for text in verdict.sentences)
    assert verdict.answer.behind == ()
    # The lead of the method with fewer settings is understated by luck, so it stands.
    assert judged({**many, ("vera", 1e-3): [2.0, 2.002, 2.001]}).claims[0].is_shown


def test_fresh_seeds_alone_are_reported_and_lift_the_mark() -> None:
    """Tuned on seeds 0 to 2, trained again on seeds 3 to 5, where lora's lead over vera is gone."""
    ladder = {("lora", 1e-3 * 2**i): [2.0 + 0.1 * i + 0.001 * s for s in range(3)] for i in range(5)}
    figures = {**ladder, ("vera", 1e-3): [2.4, 2.402, 2.401]}
    fresh = {("lora", 1e-3): [2.6, 2.602, 2.601], ("vera", 1e-3): [2.401, 2.402, 2.4]}
    whole = comparison_of({key: [*values, *fresh.get(key, [])] for key, values in figures.items()})
    tags = {
        trial_id: {PHASE_TAG: "tune" if seed < 3 else "confirm"}
        for trial_id, seed in zip(whole.table["trial_id"], whole.table["seed"], strict=True)
    }
    whole = replace(whole, tags=tags)
    verdict = judge(whole, scores_of(whole))
    assert verdict.seeds == (3, 4, 5)
    (claim,) = verdict.claims
    assert (claim.better, claim.is_shown, claim.mark) == ("vera", True, "")
    assert verdict.answer.recommended == "vera"
    assert "3 fresh seeds" in " ".join(verdict.sentences)
    assert verdict.optimism == {}
    assert next(choice for choice in verdict.choices if choice.name == "lora").setting.values == {"lr": 1e-3}


def test_optimism_is_stated_where_reported_seeds_chose() -> None:
    lucky = {("lora", 1e-3): [2.0, 2.3, 2.3], ("lora", 1e-2): [2.3, 2.2, 2.25], ("vera", 1e-3): [2.5, 2.51, 2.52]}
    verdict = judged(lucky)
    assert verdict.optimism["vera"] is None
    own = verdict.optimism["lora"]
    assert own is not None
    assert own.value > 0
    (sentence,) = [sentence for sentence in verdict.sentences if "Optimism" in sentence]
    assert f"lora +{own.value:.4f} (2 settings)" in sentence


def test_a_lead_that_tuning_can_have_made_recommends_nothing() -> None:
    """The bound of the lucky method would be 0, because its lead is in it."""
    many = {("lora", 1e-3 * 2**i): [2.3 + 0.1 * i + 0.001 * s for s in range(3)] for i in range(9)}
    verdict = judged({**many, ("vera", 1e-3): [2.318, 2.319, 2.317]}, noise=0.001)
    assert verdict.answer.recommended == "vera", "its bound is too large rather than too small"
    assert "no confirmed difference to lora" in verdict.sentences[0]


def test_the_answer_names_what_it_does_not_claim() -> None:
    """Better than c, marked; and pairs that the plan leaves out: neither is "better" nor "not told apart"."""

    def ladder(method: str, base: float, num: int) -> dict[tuple[str, float], Sequence[float]]:
        return {(method, 1e-3 * 2**i): [base + 0.1 * i + 0.001 * seed for seed in range(3)] for i in range(num)}

    marked = judged({**ladder("a", 2.3, 5), **ladder("b", 2.5, 3), **ladder("c", 2.7, 2)})
    assert "better than every other" not in marked.sentences[0]
    assert "no confirmed difference to c" in marked.sentences[0]
    three = {("a", 1e-3): [2.3, 2.31, 2.32], ("b", 1e-3): [2.9, 2.91, 2.92], ("c", 1e-3): [2.6, 2.61, 2.62]}
    planned = judged(three, sweep_parameters={"verdict.against": "c"})
    assert "by the plan not tested against b" in planned.sentences[0]
    assert "not told apart" not in planned.sentences[0]
    assert any("each method against c, as planned before the run" in text for text in planned.sentences)


def test_a_method_without_scores_is_named_in_the_answer() -> None:
    comparison = comparison_of({("a", 1e-3): [2.3] * 3, ("b", 1e-3): [2.4, 2.41, 2.42], ("c", 1e-3): [2.6, 2.61, 2.62]})
    scores = scores_of(comparison)
    verdict = judge(comparison, scores[~scores["trial_id"].str.startswith("a")])
    assert verdict.sentences[0] == "Take b: better than every other compared method. Not compared: a."
    assert "a: it has no scores of single test rows; it is not compared" in verdict.warnings


def test_an_only_adapter_is_not_recommended_by_default() -> None:
    comparison = costed({("full", 1e-3): [2.25, 2.41, 2.12], ("lora", 1e-3): [2.3, 2.11, 2.42]}, full=100_000, lora=10)
    verdict = judge(comparison, scores_of(comparison))
    assert verdict.answer.recommended == ""
    assert verdict.sentences[0].startswith("lora is the only adapter that is compared; it has a test loss of 2.")
    assert trial_to_keep(comparison, verdict).startswith("lora"), "the export suits the answer"


def test_confirming_trials_that_failed_leave_the_tuning_seeds() -> None:
    whole = comparison_of({("lora", 1e-3): [2.3, 2.31, 2.32, 2.3], ("vera", 1e-3): [2.6, 2.61, 2.62, 2.6]})
    is_fresh = whole.table["seed"] == 3
    whole.table.loc[is_fresh, "status"] = "FAILED"
    whole.table.loc[is_fresh, ["test/loss", "eval/final_loss"]] = math.nan
    ids = whole.table["trial_id"]
    tags = {key: {PHASE_TAG: "confirm" if fresh else "tune"} for key, fresh in zip(ids, is_fresh, strict=True)}
    whole = replace(whole, tags=tags)
    verdict = judge(whole, scores_of(whole))
    assert verdict.seeds == (0, 1, 2)
    assert any("no trial with a fresh seed has a test figure yet (--resume" in text for text in verdict.warnings)


def test_the_margin_is_that_of_the_best_even_where_more_is_better() -> None:
    comparison = comparison_of({("a", 1e-3): [0.9, 0.9, 0.9], ("b", 1e-3): [0.1, 0.1, 0.1]})
    result = judge(comparison, scores_of(comparison)).result
    assert result is not None
    means = [estimate.mean for estimate in result.estimates]
    assert best_mean(result, "test/loss") == min(means)
    assert best_mean(result, "test/accuracy") == max(means)


def test_margin_and_cost_are_read_from_the_record() -> None:
    comparison = costed(CLEAR, lora=1000, lora_plus=400)
    comparison.table["memory/peak_allocated_bytes"] = [
        {"lora": 1.0, "lora_plus": 9.0, "vera": 5.0}[method] for method in comparison.table["method"]
    ]
    by_memory = replace(comparison, sweep_parameters={"verdict.cost": "memory"})
    scores = scores_of(comparison, noise=0.001)
    assert judge(by_memory, scores).answer.recommended == "lora"
    narrow = judge(replace(comparison, sweep_parameters={"verdict.margin": "0.0000001"}), scores)
    assert narrow.answer.recommended == ""
    assert judge(comparison, scores).margin == pytest.approx(0.01 * 2.301, rel=0.03)


def test_the_answer_names_methods_best_at_a_ladders_end() -> None:
    rising = {**THREE_SEEDS, ("vera", 1e-4): [2.9, 2.91, 2.92]}
    end = "The best value of vera was the last of a ladder, so a longer one may change this."
    assert judged(rising).sentences[0].endswith(end)
    assert "ladder" not in judged(THREE_SEEDS).sentences[0]


def test_the_trial_to_keep_belongs_to_the_answer() -> None:
    comparison = costed(CLEAR, lora=1000, lora_plus=400)
    scores = scores_of(comparison, noise=0.001)
    assert trial_to_keep(comparison, judge(comparison, scores)) == "lora_plus-0.001-0"
    assert trial_to_keep(comparison, judge(comparison)) == "lora-0.001-0"  # nothing is recommended: the lowest loss
