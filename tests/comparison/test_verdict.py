"""The verdict: what it compares, what it claims and refuses, its answer, and how the terminal shows it."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import loragrid as lg
from loragrid.cli import main as cli
from loragrid.comparison.findings import pair_sentence
from loragrid.comparison.item_scores import load_scores
from loragrid.comparison.metric_text import format_difference, format_p, format_size
from loragrid.comparison.verdict import Verdict, judge, load_verdict
from loragrid.report.verdict_table import render_verdict
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import Scalar, default_tracking_uri
from tests.support.judged_sweeps import (
    LABELS,
    NUM_ROWS,
    THREE_SEEDS,
    comparison_of,
    judged,
    scores_of,
)


def text_of(verdict: Verdict, width: int = 120) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_verdict(verdict, width))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_every_pair_is_tested_over_seeds_and_rows_together() -> None:
    comparison = comparison_of(THREE_SEEDS)
    scores = scores_of(comparison)
    verdict = judge(comparison, scores.sample(frac=1, random_state=1))
    assert [choice.method for choice in verdict.choices] == ["lora_plus", "lora", "vera"]
    assert [choice.method for choice in verdict.references] == ["frozen"]
    assert verdict.result is not None
    assert [(test.first, test.second) for test in verdict.result.pairs] == [
        ("lora_plus", "lora"),
        ("lora_plus", "vera"),
        ("lora", "vera"),
    ]
    assert (verdict.result.num_seeds, verdict.result.num_rows, verdict.seeds) == (3, NUM_ROWS, (0, 1, 2))
    means = {
        method: np.mean([scores[scores["trial_id"] == f"{method}-0.001-{seed}"]["loss"].sum() for seed in range(3)])
        / sum(LABELS)
        for method in ("lora", "lora_plus", "vera")
    }
    for test in verdict.result.pairs:
        assert test.difference == pytest.approx(means[test.first] - means[test.second], abs=1e-12)


def test_seeds_of_only_one_method_are_not_compared() -> None:
    verdict = judged({("lora", 1e-3): [2.3, 2.33, 2.31, 2.6], ("vera", 1e-3): [2.42, 2.41, 2.43]}, noise=0.0)
    assert verdict.seeds == (0, 1, 2)
    assert verdict.result is not None
    assert verdict.result.pairs[0].difference == pytest.approx((2.30 + 2.33 + 2.31) / 3 - 2.42, abs=1e-9)


def test_a_method_without_enough_seeds_does_not_silence_the_others() -> None:
    verdict = judged({**THREE_SEEDS, ("dora", 1e-3): [2.25]})
    assert verdict.result is not None
    assert verdict.result.refusal == ""
    assert {estimate.name for estimate in verdict.result.estimates} == {"lora", "lora_plus", "vera"}
    assert "dora: only 1 seed with scores of single test rows; it is not compared" in verdict.warnings
    assert verdict.estimate("dora") is None


def test_rows_scored_by_one_trial_are_left_out_and_reported() -> None:
    comparison = comparison_of({("lora", 1e-3): [2.3] * 3, ("vera", 1e-3): [2.42] * 3})
    verdict = judge(comparison, scores_of(comparison).drop(index=[0, 1, 2]))
    assert verdict.result is not None
    assert verdict.result.num_rows == NUM_ROWS - 3
    text = "only 57 of 60 test rows are scored by every compared trial; the others are left out of the comparison"
    assert text in verdict.warnings


def test_groups_of_rows_are_the_unit_of_the_tests() -> None:
    comparison = comparison_of(THREE_SEEDS)
    scores = scores_of(comparison)
    scores["group"] = scores.groupby("trial_id").cumcount() // 4
    verdict = judge(comparison, scores)
    assert verdict.result is not None
    assert (verdict.result.num_rows, verdict.result.num_groups) == (60, 15)
    assert any("60 test rows in 15 groups" in sentence for sentence in verdict.sentences)


@pytest.mark.parametrize("scores", [False, True])
def test_nothing_is_claimed_without_test_rows_or_scores(scores: bool) -> None:
    comparison = comparison_of(THREE_SEEDS, key="test/loss" if scores else "eval/other")
    verdict = judge(comparison)
    assert verdict.result is None
    assert verdict.claims == ()
    assert verdict.answer.recommended == ""
    reason = "no scores of the same test rows" if scores else "there are no test rows"
    assert reason in verdict.sentences[0]
    assert "grid.seed: [0, 1, 2]" in verdict.sentences[0]


@pytest.mark.parametrize(("num", "words"), [(1, "share 1 seed"), (2, "share 2 seeds")])
def test_fewer_than_three_seeds_claim_nothing_about_methods(num: int, words: str) -> None:
    verdict = judged({("lora", 1e-3): [2.3, 2.33][:num], ("vera", 1e-3): [3.4, 3.41][:num]}, noise=0.01)
    assert verdict.sentences[0].startswith(f"No claim about methods: the methods {words}")
    assert "grid.seed: [0, 1, 2]" in verdict.sentences[0]
    assert (verdict.claims, verdict.answer.recommended, verdict.answer.leader) == ((), "", "")
    assert not any("better" in sentence for sentence in verdict.sentences)
    # The separate statement is about these models, and says so.
    (trained,) = verdict.trained_sentences
    assert trained.startswith("Of these trained models (seed")
    assert "lora is better than vera by 1.0" in trained
    assert trained.endswith("Other seeds may reverse this: it is no claim about methods.")


def test_seeds_that_disagree_show_nothing_however_many_rows() -> None:
    """The rows of these seeds separate the methods with certainty; other seeds may not."""
    verdict = judged({("lora", 1e-3): [2.2, 2.5, 2.3], ("vera", 1e-3): [2.5, 2.4, 2.6]}, noise=0.001)
    assert verdict.claims[0].is_shown is False
    assert "lora is better than vera" in verdict.trained_sentences[0]
    assert verdict.answer.recommended == ""
    assert "; not told apart from vera; " in verdict.sentences[0]


def test_scores_that_are_not_finite_are_left_out() -> None:
    comparison = comparison_of(THREE_SEEDS)
    scores = scores_of(comparison)
    scores.loc[scores.index[3], "loss"] = math.inf
    verdict = judge(comparison, scores)
    assert verdict.result is not None
    assert verdict.result.num_rows >= NUM_ROWS - 1
    own = scores[scores["trial_id"] == "lora-0.001-0"].index[0]
    scores.loc[own, "loss"] = math.inf
    assert any("only 59 of 60 test rows" in warning for warning in judge(comparison, scores).warnings)


def test_methods_with_other_seeds_are_named() -> None:
    figures = {("a", 1e-3): [2.3, 2.31, 2.32], ("b", 1e-3): [2.4, 2.41, 2.42]}
    comparison = comparison_of(figures)
    comparison.table.loc[comparison.table["method"] == "b", "seed"] += 10
    verdict = judge(comparison, scores_of(comparison))
    assert "methods have different seeds, and only common ones count: a 0, 1, 2; b 10, 11, 12" in verdict.warnings


def test_names_with_markup_are_shown_as_they_are() -> None:
    text = "\n".join(text_of(judged({("[/]x", 1e-3): [2.3, 2.31, 2.32], ("b[red]", 1e-3): [2.6, 2.61, 2.62]})))
    assert "against" in text
    assert text.count("[/]x") >= 3


def test_the_planned_pairs_are_read_from_the_record() -> None:
    planned = {"verdict.against": "lora"}
    verdict = judged(THREE_SEEDS, sweep_parameters=planned)
    assert verdict.result is not None
    assert [test.in_family for test in verdict.result.pairs] == [True, False, True]
    assert "corrected for 2 pairs (Holm)" in " ".join(verdict.sentences)
    gone = judged(THREE_SEEDS, sweep_parameters={**planned, "verdict.against": "dora"})
    assert any("verdict.against: dora is not among the compared methods" in warning for warning in gone.warnings)


def test_accuracy_is_higher_better_and_written_in_points() -> None:
    figures = {("lora", 1e-3): [0.95, 0.97, 0.96], ("vera", 1e-3): [0.20, 0.22, 0.21]}
    comparison = comparison_of(figures, "test/accuracy")
    comparison.table["eval/accuracy"] = comparison.table["test/accuracy"]
    verdict = judge(comparison, scores_of(comparison, correct=True))
    assert (verdict.metric, verdict.higher_is_better) == ("test/accuracy", True)
    assert verdict.sentences[0] == "Take lora: better than every other compared method."
    assert "points" in pair_sentence(verdict.claims[0], verdict.metric)
    estimate = verdict.estimate("lora")
    assert estimate is not None
    assert estimate.high is not None
    assert estimate.high <= 1.0
    text = "\n".join(text_of(verdict))
    assert "%" in text
    assert "0.9" not in text


def test_a_pair_is_described_from_the_side_of_the_better() -> None:
    verdict = judged({("lora", 1e-3): [2.6, 2.61, 2.62], ("vera", 1e-3): [2.31, 2.32, 2.33]}, noise=0.01)
    (claim,) = verdict.claims
    assert (claim.better, claim.worse) == ("vera", "lora")
    sentence = pair_sentence(claim, verdict.metric)
    assert sentence.startswith("vera is better than lora by 0.2")
    low = float(sentence.partition("interval +")[2].split()[0])
    assert 0.2 < low < 0.3


@pytest.mark.parametrize(
    ("value", "size", "difference"), [(0.0, "0.0000", "+0.0000"), (3.2e-6, "0.0000032", "+0.0000032")]
)
def test_small_differences_are_never_written_as_zero(value: float, size: str, difference: str) -> None:
    assert format_size("test/loss", value) == size
    assert format_difference("test/loss", value) == difference


def test_p_values_below_the_level_are_not_rounded_to_it() -> None:
    written = [format_p(p) for p in (0.0494, 0.04996, 0.05, 0.0001, None)]
    assert written == ["0.049", "< 0.05", "0.050", "< 0.001", "–"]


def test_a_best_value_at_a_ladders_end_is_warned_about() -> None:
    ladder: dict[tuple[str, float], Sequence[float]] = {("lora", 1e-4): [2.6], ("lora", 1e-3): [2.3]}
    assert "lora: its best lr (0.001) is the highest tried: extend the ladder" in judge(comparison_of(ladder)).warnings
    assert not any("ladder" in warning for warning in judge(comparison_of(THREE_SEEDS)).warnings)
    both = ladder | {("vera", 1e-4): [2.6], ("vera", 1e-3): [2.4]}
    (warning,) = (warning for warning in judge(comparison_of(both)).warnings if "ladder" in warning)
    assert warning == "the highest lr tried is the best of lora (0.001) and vera (0.001): extend their ladders"


def test_methods_no_better_than_the_untrained_base_are_named() -> None:
    figures = {("lora", 1e-3): [2.3], ("vera", 1e-3): [3.2], ("frozen", 1e-3): [3.0]}
    assert "The untrained base (frozen) has 3.0000; no better: vera." in judge(comparison_of(figures)).sentences


def test_single_methods_and_empty_sweeps_say_nothing_is_compared() -> None:
    assert "there is no other method to compare it with" in judge(comparison_of({("lora", 1e-3): [2.3]})).sentences[0]
    running = comparison_of({("lora", 1e-3): [2.3]})
    running.table["status"] = "RUNNING"
    verdict = judge(running)
    assert verdict.choices == ()
    assert verdict.sentences[0].startswith("Nothing can be compared yet")
    assert any("Nothing can be compared yet" in line for line in text_of(verdict))


def test_several_tasks_have_no_verdict_together() -> None:
    comparison = comparison_of({("lora", 1e-3): [2.3], ("vera", 1e-3): [2.4]})
    comparison.table["model.name"] = ["small", "large"]
    mixed = replace(comparison, axes={**comparison.axes, "model.name": "model.name"})
    verdict = judge(mixed)
    assert (verdict.choices, verdict.result, verdict.sentences) == ((), None, ())
    assert "several tasks (model.name small; model.name large)" in verdict.warnings[0]
    assert load_verdict(mixed) == verdict


def test_the_floor_is_stated_with_what_lowers_it() -> None:
    (sentence,) = [s for s in judged(THREE_SEEDS).sentences if s.startswith("A true difference of")]
    assert "is found in most such sweeps (about four of five)" in sentence
    assert "rows" in sentence


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_shows_every_choices_figure_edge_and_place(width: int) -> None:
    figures = {**THREE_SEEDS, ("lora_plus", 1e-4): [2.1, 2.134, 2.109]}
    lines = text_of(judged(figures), width)
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert "…" not in text
    assert "3.0000" in text
    assert text.count("recommended") + text.count("leading") <= 1
    if width == 120:
        own = next(line for line in lines if line.startswith("lora_plus"))
        assert "lr 0.0001↓ of 2" in own
        assert "●" in own
        (base,) = [line for line in lines if line.startswith("frozen")]
        assert base.endswith("reference")
        assert "note:" in text


def test_a_sweep_without_choice_or_seeds_has_no_table() -> None:
    lines = text_of(judge(comparison_of({("lora", 1e-3): [2.3], ("vera", 1e-3): [2.4]})))
    assert lines[0].startswith("No claim about methods")
    assert not any(line.startswith("lora ") for line in lines)


def record(uri: str) -> pd.DataFrame:
    """Record a sweep of two methods and two seeds, with scores for all but the failed trial; return the scores.

    The files of `vera` are as old records have them, without groups of rows.
    """
    comparison = comparison_of({("lora", 1e-3): [2.3, 2.33], ("vera", 1e-3): [2.42, 2.41], ("full", 1e-3): [2.5]})
    scores = scores_of(comparison)
    is_old = scores["trial_id"].str.startswith("vera")
    numbers = scores.groupby("trial_id").cumcount() // 2
    scores.insert(2, "group", scores["row"].where(is_old, numbers.map("{:016d}".format)))
    recorder = Recorder("judged", uri)
    recorder.start_sweep("only", {}, {})
    for row in comparison.table.to_dict("records"):
        parameters: dict[str, Scalar] = {"method.name": row["method"], "seed": row["seed"], "training.lr": row["lr"]}
        recorder.start_trial(row["trial_id"], parameters, {})
        if row["method"] == "full":
            recorder.end_trial(row["trial_id"], "FAILED", "out of memory")
            continue
        summary: dict[str, Any] = {key: row[key] for key in ("eval/final_loss", "test/loss", "parameters/trainable")}
        recorder.log_summary(row["trial_id"], summary)
        folder = Path(uri.removeprefix("sqlite:///")).parent / f"of-{row['trial_id']}"
        folder.mkdir(parents=True)
        unwritten = ["trial_id", "group"] if row["method"] == "vera" else ["trial_id"]
        own = scores[scores["trial_id"] == row["trial_id"]].drop(columns=unwritten)
        own.to_csv(folder / "test.csv", index=False)
        recorder.log_artifacts(row["trial_id"], folder, "scores")
        recorder.end_trial(row["trial_id"], "FINISHED")
    recorder.end_sweep("FINISHED")
    assert recorder.deliver()
    return scores[~scores["trial_id"].str.startswith("full")].reset_index(drop=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pd.DataFrame]:
    uri = default_tracking_uri(str(tmp_path_factory.mktemp("store")), None)
    return uri, record(uri)


def test_scores_are_read_exactly_with_row_ids_as_text(
    store: tuple[str, pd.DataFrame], capfd: pytest.CaptureFixture[str]
) -> None:
    uri, written = store
    comparison = lg.load_comparison("judged", uri)
    scores = load_scores(comparison)
    pd.testing.assert_frame_equal(scores, written, check_exact=True)
    assert set(load_scores(comparison, ["vera-0.001-1", "full-0.001-0"])["trial_id"]) == {"vera-0.001-1"}
    assert "Downloading" not in capfd.readouterr().err
    assert load_scores(comparison, []).columns.tolist() == ["trial_id", "row", "group", "num_labels", "loss"]


def test_a_verdict_from_the_store_is_that_of_its_scores(store: tuple[str, pd.DataFrame]) -> None:
    uri, written = store
    comparison = lg.load_comparison("judged", uri)
    verdict = lg.load_verdict(comparison)
    assert verdict == lg.judge(comparison, written)
    assert verdict.result is not None
    assert verdict.result.num_rows == NUM_ROWS
    assert "full: no setting can be chosen: none of its trials has finished" in verdict.warnings


def test_compare_prints_the_verdict_below_its_table(
    store: tuple[str, pd.DataFrame], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(*options: str) -> tuple[object, str, str]:
        folder = Path(store[0].removeprefix("sqlite:///")).parent
        monkeypatch.setattr(sys, "argv", ["loragrid", "compare", "judged", "--storage", str(folder), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    code, out, err = compare()
    assert (code, err) == (0, "")
    table, _, below = out.partition("full-0.001-0 failed: out of memory")
    assert "judged  only, 5 trials, 1 failed" in table
    assert "No claim about methods: the methods share 2 seeds" in " ".join(below.split())
    assert "to export: lora-0.001-0 (lowest evaluation loss of a single trial, 2.3000)" in " ".join(below.split())
    code, _, err = compare("--apart", "rank")
    assert code == 2
    assert "'rank' is no axis of this sweep" in err
