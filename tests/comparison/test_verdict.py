"""The verdict: its tests of every pair, on scores per test row from a real store, and its sentences."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

import loragrid as lg
from loragrid.cli import main as cli
from loragrid.comparison.findings import is_shown, show_p
from loragrid.comparison.item_scores import load_scores
from loragrid.comparison.selection import Verdict
from loragrid.comparison.statistics import PairedTest, holm, mcnemar, paired_bootstrap
from loragrid.comparison.table import Comparison
from loragrid.comparison.verdict import judge, load_verdict
from loragrid.report.verdict_table import render_verdict
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import Scalar, default_tracking_uri
from tests.support.comparisons import made_up_comparison

NUM_ROWS = 60
LABELS = [5 + i % 17 for i in range(NUM_ROWS - 1)] + [5 + (NUM_ROWS - 2) % 17]
# Sixteen hex digits can look like an integer or like a number with an exponent; two rows have the same content.
ROW_IDS = [f"{i:016d}" for i in range(NUM_ROWS - 3)] + ["12345678901e2345", "0000000098765432", "0000000098765432"]


def comparison_of(figures: Mapping[tuple[str, float], Sequence[float]], key: str = "test/loss") -> Comparison:
    """(method, lr) -> one figure per seed, used for validation and for test rows."""
    rows = [
        {
            "trial_id": f"{method}-{lr:g}-{seed}",
            "status": "FINISHED",
            "reason": "",
            "run_id": "r",
            "method": method,
            "lr": lr,
            "seed": seed,
            "eval/final_loss": figure,
            key: figure,
            "parameters/trainable": 0 if method == "frozen" else 1000,
        }
        for (method, lr), values in figures.items()
        for seed, figure in enumerate(values)
    ]
    return made_up_comparison(rows, {"lr": "training.lr", "seed": "seed"}, experiment_name="judged")


THREE_SEEDS: dict[tuple[str, float], Sequence[float]] = {
    ("lora", 1e-4): [2.60, 2.62, 2.61],
    ("lora", 1e-3): [2.30, 2.33, 2.31],
    ("lora", 1e-2): [2.40, 2.43, 2.41],
    ("lora_plus", 1e-3): [2.20, 2.234, 2.209],
    ("vera", 1e-3): [2.32, 2.31, 2.33],
    ("frozen", 1e-3): [3.0, 3.0, 3.0],
}


def scores_of(comparison: Comparison, seed: int = 0, correct: bool = False) -> pd.DataFrame:
    """Every trial's loss on each row: the trial's mean plus the row's difficulty plus a little noise."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(0.0, 0.5, NUM_ROWS)
    difficulty[-1] = difficulty[-2]
    parts = []
    for row in comparison.table.to_dict("records"):
        level = float(row["eval/final_loss"])
        per_label = level + difficulty + generator.normal(0.0, 0.05, NUM_ROWS)
        part = pd.DataFrame({"row": ROW_IDS, "num_labels": LABELS, "loss": per_label * LABELS})
        if correct:
            part["correct"] = (generator.random(NUM_ROWS) < 0.5).astype(int)
        part.insert(0, "trial_id", row["trial_id"])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def text_of(verdict: Verdict, width: int = 120) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_verdict(verdict))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_every_pair_is_tested_over_shared_seeds_and_corrected() -> None:
    verdict = judge(comparison_of(THREE_SEEDS))
    assert [choice.method for choice in verdict.choices] == ["lora_plus", "lora", "vera"]
    assert [choice.method for choice in verdict.references] == ["frozen"]
    pairs = [(contrast.first, contrast.second) for contrast in verdict.contrasts]
    assert pairs == [("lora_plus", "lora"), ("lora_plus", "vera"), ("lora", "vera")]
    figures = {method: THREE_SEEDS[method, 1e-3] for method in ("lora", "lora_plus", "vera")}
    p_values = [stats.ttest_rel(figures[a], figures[b]).pvalue for a, b in pairs]
    for contrast, p, adjusted in zip(verdict.contrasts, p_values, holm(p_values), strict=True):
        assert contrast.over_seeds is not None
        assert contrast.over_seeds.p_value == pytest.approx(p)
        assert contrast.over_seeds.p_adjusted == pytest.approx(adjusted)
        assert contrast.over_seeds.num == 3
        assert contrast.over_items is None


def test_seeds_of_only_one_method_are_not_paired() -> None:
    comparison = comparison_of({("lora", 1e-3): [2.3, 2.33, 2.31, 2.6], ("vera", 1e-3): [2.42, 2.41, 2.43]})
    (contrast,) = judge(comparison).contrasts
    assert contrast.over_seeds is not None
    assert contrast.over_seeds.num == 3
    assert contrast.over_seeds.difference == pytest.approx((2.30 + 2.33 + 2.31) / 3 - 2.42)


def test_rows_are_tested_by_losses_averaged_over_shared_seeds() -> None:
    comparison = comparison_of({("lora", 1e-3): [2.3, 2.33], ("vera", 1e-3): [2.42, 2.41]})
    scores = scores_of(comparison)
    (contrast,) = judge(comparison, scores.sample(frac=1, random_state=1)).contrasts
    per_label = [
        np.mean([scores[scores["trial_id"] == f"{method}-0.001-{seed}"]["loss"] / LABELS for seed in (0, 1)], axis=0)
        for method in ("lora", "vera")
    ]
    reference = paired_bootstrap(per_label[0], per_label[1], LABELS)
    assert contrast.over_items is not None
    assert contrast.over_items.num == NUM_ROWS
    assert contrast.over_items.difference == pytest.approx(reference.difference)
    assert contrast.over_items.low == pytest.approx(reference.low, abs=0.005)  # the rows come in another order
    assert contrast.over_items.p_adjusted == contrast.over_items.p_value


def test_one_seed_is_tested_by_mcnemar_several_by_bootstrap() -> None:
    one = comparison_of({("lora", 1e-3): [0.5], ("vera", 1e-3): [0.4]}, "test/accuracy")
    scores = scores_of(one, correct=True)
    (contrast,) = judge(one, scores).contrasts
    correct = [scores[scores["trial_id"] == f"{method}-0.001-0"]["correct"] for method in ("lora", "vera")]
    reference = mcnemar(list(correct[0]), list(correct[1]))
    assert contrast.over_seeds is None
    assert contrast.over_items is not None
    assert (contrast.over_items.test, contrast.over_items.difference) == (reference.test, reference.difference)
    assert contrast.over_items.p_value == reference.p_value
    two = comparison_of({("lora", 1e-3): [0.5, 0.5], ("vera", 1e-3): [0.4, 0.4]}, "test/accuracy")
    scores = scores_of(two, correct=True)
    (contrast,) = judge(two, scores).contrasts
    mean = {m: scores[scores["trial_id"].str.startswith(m)]["correct"].mean() for m in ("lora", "vera")}
    assert contrast.over_items is not None
    assert contrast.over_items.test == "paired bootstrap over items"
    assert contrast.over_items.difference == pytest.approx(mean["lora"] - mean["vera"])


def test_rows_scored_by_one_trial_are_left_out_and_reported() -> None:
    comparison = comparison_of({("lora", 1e-3): [2.3], ("vera", 1e-3): [2.42]})
    scores = scores_of(comparison)
    verdict = judge(comparison, scores.drop(index=[0, 1, 2]))
    (contrast,) = verdict.contrasts
    assert contrast.over_items is not None
    assert contrast.over_items.num == NUM_ROWS - 3
    assert "lora and vera: only 57 of 60 test rows are scored by both" in verdict.warnings
    without_vera = judge(comparison, scores[scores["trial_id"] != "vera-0.001-0"])
    assert without_vera.contrasts[0].over_items is None
    assert (
        judge(comparison, load_scores(comparison_of({("lora", 1e-3): [2.3]}, "eval/x"))).contrasts[0].over_items is None
    )


def test_a_verdict_names_the_best_and_the_evidence() -> None:
    verdict = judge(comparison_of(THREE_SEEDS))
    text = "\n".join(verdict.sentences)
    assert verdict.sentences[0].startswith("lora_plus has the lowest test loss: 2.2143 (95 % interval 2.1706 to 2.2581")
    assert "n = 3 seeds" in verdict.sentences[0]
    assert "The untrained base (frozen) has 3.0000." in verdict.sentences
    (shown,) = [sentence for sentence in verdict.sentences if sentence.startswith("lora_plus against lora:")]
    assert "better by 0.0990 over 3 seeds (95 % interval 0.0924 to 0.1056, p < 0.001)" in shown
    (not_shown,) = [sentence for sentence in verdict.sentences if sentence.startswith("lora against vera:")]
    assert "no difference shown over 3 seeds (0.0067 better; 95 % interval −0.0" in not_shown
    assert '"No difference shown" is not "equal"' in text
    assert "Holm's over all 3 pairs" in text
    assert "are equal" not in text


def test_tied_methods_share_the_lead() -> None:
    tied = {("lora", 1e-3): [0.5, 0.7], ("vera", 1e-3): [0.7, 0.5], ("full", 1e-3): [0.1, 0.2]}
    sentences = judge(comparison_of(tied, key="test/accuracy")).sentences
    assert sentences[0].startswith("lora has the highest test accuracy: 0.6000")
    assert sentences[0].endswith(", and vera the same.")
    assert any(s.startswith("lora against vera: no difference shown over 2 seeds (the same; ") for s in sentences)
    assert "the same" not in judge(comparison_of(THREE_SEEDS)).sentences[0]


def test_p_values_below_the_level_are_not_rounded_to_it() -> None:
    assert [show_p(p) for p in (0.0496, 0.04, 0.05, 0.0502, 0.0001)] == [
        "p < 0.05",
        "p = 0.04",
        "p = 0.05",
        "p = 0.05",
        "p < 0.001",
    ]
    at_level = PairedTest(test="t", difference=1.0, low=0.0, high=2.0, p_value=0.05, p_adjusted=0.05, num=9)
    assert not is_shown(at_level)


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


def test_one_seed_says_nothing_about_seeds_and_two_say_little() -> None:
    one = comparison_of({("lora", 1e-3): [2.3], ("vera", 1e-3): [2.4]})
    text = " ".join(judge(one).sentences)
    assert "lora has the lowest test loss: 2.3000 (n = 1 seed)." in text
    assert "One seed: nothing is known about other seeds, which may reverse any of this; no pair was tested." in text
    assert "lora against vera" not in text
    with_rows = " ".join(judge(one, scores_of(one)).sentences)
    assert "lora against vera: better by 0.0973 over 60 test rows (95 % interval 0.0" in with_rows
    assert "the tests over rows hold only for these trained adapters" in with_rows
    two = comparison_of({("lora", 1e-3): [2.3, 2.35], ("vera", 1e-3): [2.4, 2.41]})
    assert "Two seeds: over them, only a difference much larger than" in " ".join(judge(two).sentences)


def test_evidence_only_over_rows_is_limited_to_these_adapters() -> None:
    comparison = comparison_of({("lora", 1e-3): [2.2, 2.5, 2.3], ("vera", 1e-3): [2.5, 2.4, 2.6]})
    verdict = judge(comparison, scores_of(comparison))
    (sentence,) = [sentence for sentence in verdict.sentences if sentence.startswith("lora against vera:")]
    assert "no difference shown over 3 seeds" in sentence
    assert "; better by 0.1" in sentence
    assert (
        "A difference shown only over test rows holds for these trained adapters: other seeds might reverse it."
        in verdict.sentences
    )


def test_higher_accuracy_is_better_in_words_too() -> None:
    figures = {("lora", 1e-3): [0.60, 0.62, 0.61], ("vera", 1e-3): [0.40, 0.41, 0.41]}
    comparison = comparison_of(figures, "test/accuracy")
    comparison.table["eval/accuracy"] = comparison.table["test/accuracy"]
    verdict = judge(comparison)
    assert verdict.higher_is_better
    assert verdict.sentences[0].startswith("lora has the highest test accuracy: 0.6100")
    assert verdict.sentences[1].startswith("lora against vera: better by 0.2033 over 3 seeds (95 % interval 0.1")


def test_a_pair_won_by_its_second_is_called_worse() -> None:
    """The first is best by its mean over all its seeds, but worse on the shared seeds."""
    figures = {("lora", 1e-3): [2.41, 2.42, 2.40, 1.0, 1.0], ("vera", 1e-3): [2.31, 2.33, 2.302]}
    sentence = judge(comparison_of(figures)).sentences[1]
    assert sentence.startswith("lora against vera: worse by 0.0960 over 3 seeds (95 % interval 0.0")


def test_single_methods_and_empty_sweeps_say_nothing_is_compared() -> None:
    assert "there is no other method to compare it with" in judge(comparison_of({("lora", 1e-3): [2.3]})).sentences[0]
    running = comparison_of({("lora", 1e-3): [2.3]})
    running.table["status"] = "RUNNING"
    verdict = judge(running)
    assert verdict.choices == ()
    assert verdict.sentences[0].startswith("Nothing can be compared yet")
    assert any("Nothing can be compared yet" in line for line in text_of(verdict))


def test_many_pairs_without_the_best_are_only_counted() -> None:
    generator = np.random.default_rng(0)
    figures = {(f"m{i}", 1e-3): (2.0 + 0.1 * i + generator.normal(0, 0.001, 4)).tolist() for i in range(6)}
    sentences = judge(comparison_of(figures)).sentences
    assert sum(" against " in sentence for sentence in sentences) == 5
    assert "Among the other 10 pairs differences were shown: 10 of 10 over seeds." in sentences


def test_several_tasks_have_no_verdict_together() -> None:
    comparison = comparison_of({("lora", 1e-3): [2.3], ("vera", 1e-3): [2.4]})
    comparison.table["model.name"] = ["small", "large"]
    axes = {**comparison.axes, "model.name": "model.name"}
    mixed = Comparison(**{**{f: getattr(comparison, f) for f in comparison.__dataclass_fields__}, "axes": axes})
    verdict = judge(mixed)
    assert not verdict.choices
    assert not verdict.contrasts
    assert "several tasks (model.name small; model.name large)" in verdict.warnings[0]
    assert load_verdict(mixed) == verdict


def test_methods_that_are_all_the_same_are_seldom_told_apart() -> None:
    """A simulation of selection over a ladder, tests over seeds and Holm together: at most 5 % of families err."""
    simulations = 150
    generator = np.random.default_rng(21)
    errors = 0
    for _ in range(simulations):
        seeds = generator.normal(0, 0.1, 4)
        figures = {
            (method, lr): (2.3 + seeds + generator.normal(0, 0.02, 4)).tolist()
            for method, lr in itertools.product(("a", "b", "c"), (1e-4, 1e-3))
        }
        comparison = comparison_of(figures)
        # Test rows differ from validation rows: new noise for the same seeds.
        comparison.table["test/loss"] = [2.3 + seeds[s] + generator.normal(0, 0.02) for s in comparison.table["seed"]]
        tests = [contrast.over_seeds for contrast in judge(comparison).contrasts]
        errors += any(test is not None and test.p_adjusted is not None and test.p_adjusted < 0.05 for test in tests)
    assert errors / simulations <= 0.05 + 3.3 * (0.05 * 0.95 / simulations) ** 0.5


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_shows_every_choices_figures_edge_and_default(width: int) -> None:
    figures = {**THREE_SEEDS, ("lora_plus", 1e-4): [2.1, 2.134, 2.109]}
    lines = text_of(judge(comparison_of(figures)), width)
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for figure in ("2.1143", "2.3133", "2.3200", "3.0000", "lr 0.001", "lr"):
        assert figure in text
    if width == 120:
        rows = {line.split()[0]: line for line in lines if "±" in line and "against" not in line}
        assert "lr 0.0001↓ of 2  2.1143 ± 0.0438 (3)  2.1143 ± 0.0438 (3)  2.2143 ± 0.0438 (3)" in rows["lora_plus"]
        assert "lr 0.001 of 3" in rows["lora"]
        assert rows["lora"].endswith("the same")
        assert "note:" in text


def test_a_sweep_without_choice_or_seeds_has_no_table() -> None:
    lines = text_of(judge(comparison_of({("lora", 1e-3): [2.3], ("vera", 1e-3): [2.4]})))
    assert len(lines) == 2
    assert lines[0].startswith("lora has the lowest test loss")


def record(uri: str) -> pd.DataFrame:
    """Record a sweep of two methods and two seeds, with scores for all but the failed trial; return the scores."""
    comparison = comparison_of({("lora", 1e-3): [2.3, 2.33], ("vera", 1e-3): [2.42, 2.41], ("full", 1e-3): [2.5]})
    scores = scores_of(comparison)
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
        own = scores[scores["trial_id"] == row["trial_id"]].drop(columns="trial_id")
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
    assert load_scores(comparison, []).columns.tolist() == ["trial_id", "row", "num_labels", "loss"]


def test_a_verdict_from_the_store_is_that_of_its_scores(store: tuple[str, pd.DataFrame]) -> None:
    uri, written = store
    comparison = lg.load_comparison("judged", uri)
    verdict = lg.load_verdict(comparison)
    assert verdict == lg.judge(comparison, written)
    assert verdict.contrasts[0].over_items is not None
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
    assert "lora has the lowest test loss: 2.3150" in below
    assert "over 60 test rows" in below
    code, _, err = compare("--apart", "rank")
    assert code == 2
    assert "'rank' is no axis of this sweep" in err
