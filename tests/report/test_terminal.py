"""The terminal's table and the picture of loss curves, for comparisons with known values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from rich.console import Console

from loragrid.comparison.table import Comparison
from loragrid.formatting import format_bytes, format_count, format_seconds, format_value
from loragrid.report.loss_curves import COLOURS, PALE, _limit_height, group_by_setting, has_losses, plot_loss_curves
from loragrid.report.terminal import render_table
from tests.support.comparisons import Point, made_up_comparison


def comparison_of(rows: Sequence[Mapping[str, Any]], curves: Sequence[Point] = ()) -> Comparison:
    axes = {"rank": "method.rank", "lr_ratio": "method.lr_ratio", "seed": "seed"}
    question = "Which is best?"
    return made_up_comparison(rows, axes, curves, experiment_name="quickstart", sweep="first", question=question)


ROWS: list[dict[str, Any]] = [
    {"trial_id": "lora-1", "method": "lora", "rank": 8, "eval/final_loss": 2.5, "parameters/trainable": 460_800},
    {"trial_id": "vera-1", "method": "vera", "rank": 256, "status": "FAILED", "reason": "out of memory\nmore"},
    {"trial_id": "lora_plus-1", "method": "lora_plus", "rank": 8, "lr_ratio": 16.0, "eval/final_loss": 2.25},
    {"trial_id": "full-1", "method": "full", "rank": None, "eval/final_loss": 2.75},
]


METHODS_OF_ROWS = {row["method"] for row in ROWS}


def text_of(comparison: Comparison, width: int = 100) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_table(comparison, width))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_table_is_sorted_by_loss_with_failures_last() -> None:
    lines = text_of(comparison_of(ROWS, [("lora-1", "lora", 0, "eval/loss", 3.0)]))
    starts = [
        line.split()[0] for line in lines if line.split() and line.split()[0] in ("lora", "lora_plus", "full", "vera")
    ]
    assert starts == ["lora_plus", "lora", "full", "vera"]
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["lora_plus"][1:4] == ["8", "16", "2.2500"]
    assert rows["lora"][1:6] == ["8", "–", "2.5000", "461", "K"]
    assert rows["full"][1:4] == ["–", "–", "2.7500"]
    assert rows["vera"][1:4] == ["256", "–", "failed"]
    assert "vera-1 failed: out of memory" in lines
    assert "eval loss before training: 3.0000" in lines
    assert not any("best trial" in line for line in lines), "only the verdict names a winner"
    assert lines[0] == "quickstart  first, 4 trials, 1 failed"
    assert lines[1] == "Which is best?"


def test_the_table_is_sorted_by_accuracy_if_there_is_one() -> None:
    accuracies = {"lora-1": 0.5, "lora_plus-1": 0.25, "full-1": 0.5}
    rows = [{**row, "eval/accuracy": accuracies.get(row["trial_id"])} for row in ROWS]
    curves = [(name, name, 0, "eval/accuracy", share) for name, share in (("lora-1", 0.125), ("full-1", 0.0625))]
    lines = text_of(comparison_of(rows, curves))
    cells = [line.split() for line in lines if line.split()[:1] and line.split()[0] in METHODS_OF_ROWS]
    assert [row[0] for row in cells] == ["lora", "full", "lora_plus", "vera"], "of equals that with the lower loss"
    assert cells[0][3:6] == ["50.0", "%", "2.5000"]
    assert cells[3][3:5] == ["failed", "failed"]
    assert any("accuracy" in line and "loss" in line for line in lines)
    assert "eval accuracy before training: 6.2 % to 12.5 %" in lines


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_table_cuts_no_cell_and_names_omitted_columns(width: int) -> None:
    metrics = {
        "parameters/trainable": 123_456_789,
        "memory/saved_activation_bytes": 987_654_321,
        "memory/peak_allocated_bytes": 98_765_432_100,
        "time/step_seconds": 0.9876,
        "time/step_low_seconds": 0.9812,
        "time/step_high_seconds": 1.1234,
        "time/measure_repeats": 5,
        "throughput/tokens_per_second": 123_456.0,
        "convergence/steps_to_threshold": 100_000,
    }
    row = {"trial_id": "t", "method": "lora_fa_projected", "rank": 256, "lr_ratio": 16.0, "eval/final_loss": 2.25}
    lines = text_of(comparison_of([{**row, **metrics, "seed": 1}]), width)
    assert max(len(line) for line in lines) <= width
    assert "…" not in "\n".join(lines)
    (line,) = [line for line in lines if line.startswith("lora_fa_projected")]
    left_out = [line for line in lines if line.startswith("no room here")]
    shown = ["123 M", "942 MiB", "1.0 to 1.1 s", "92 GiB", "100000", "120,000"]
    assert all(text in line for text in shown) == (not left_out)
    assert line.split()[1:5] == ["256", "16", "1", "2.2500"]
    assert bool(left_out) == (width < 160)


def test_numbers_are_written_with_three_digits_and_their_unit() -> None:
    assert [format_count(n) for n in (0, 999, 460_800, 999_600, 1_234_567, 134_515_008)] == [
        "0",
        "999",
        "461 K",
        "1 M",
        "1.23 M",
        "135 M",
    ]
    assert [format_bytes(n) for n in (512, 1536, 3 * 2**30)] == ["512 B", "1.5 KiB", "3 GiB"]
    assert [format_seconds(s) for s in (0.0123, 1.5, 720)] == ["12.3 ms", "1.5 s", "12 min"]
    assert [format_value(v) for v in (8, 16.0, 1e-5, 0.001, None, float("nan"), True, "q_proj")] == [
        "8",
        "16",
        "1e-05",
        "0.001",
        "–",
        "–",
        "True",
        "q_proj",
    ]


def curves_of(trial_id: str, method: str, losses: list[float]) -> list[tuple[str, str, int, str, float]]:
    return [
        (trial_id, method, step, key, loss) for key in ("eval/loss", "train/loss") for step, loss in enumerate(losses)
    ]


def test_the_picture_is_a_png_with_ink_on_it(tmp_path: Path) -> None:
    curves = [*curves_of("lora-1", "lora", [3.0, 2.7, 2.5]), *curves_of("lora_plus-1", "lora_plus", [3.0, 2.5, 2.25])]
    path = plot_loss_curves(comparison_of(ROWS, curves), tmp_path / "new" / "curves.png")
    image = matplotlib.image.imread(path)
    assert image.shape[1] > 1200
    colours = {
        tuple(round(float(part) * 255) for part in pixel[:3]) for pixel in image[::2, ::2].reshape(-1, image.shape[2])
    }
    assert (0xD5, 0x5E, 0x00) in colours  # lora: second of the methods in alphabetical order
    assert (0x00, 0x9E, 0x73) in colours  # lora_plus: third


@pytest.mark.filterwarnings("error:constrained_layout")
def test_of_many_lines_the_best_are_named_and_others_pale(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"trial_id": f"lora-{rank}", "method": "lora", "rank": rank, "eval/final_loss": 2.0 + rank / 1000}
        for rank in range(1, 129)
    ]
    curves = [point for row in rows for point in curves_of(row["trial_id"], "lora", [3.0, row["eval/final_loss"]])]
    path = plot_loss_curves(comparison_of(rows, curves), tmp_path / "curves.png")
    image = (matplotlib.image.imread(path)[:, :, :3] * 255).round()

    left = image[:, : 2 * image.shape[1] // 5]

    def num_columns_with(colour: str) -> int:
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        return int((abs(left - wanted).sum(axis=2) < 3).any(axis=0).sum())

    assert num_columns_with(COLOURS[0]) > image.shape[1] / 4, "the legend leaves the panels their room"
    assert num_columns_with(PALE) > image.shape[1] / 4


def test_only_drawn_lines_are_named_lowest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loragrid.report.loss_curves.MOST_NAMED", 3)
    ends = [("vera", rank, "FAILED") for rank in range(9)] + [("lora", rank, "KILLED") for rank in range(1, 5)]
    unfinished: list[dict[str, Any]] = [
        {"trial_id": f"{method}-{rank}", "method": method, "rank": rank, "status": end} for method, rank, end in ends
    ]
    done = {"trial_id": "lora_fa-1", "method": "lora_fa", "rank": 1, "eval/final_loss": 2.9}
    curves = [point for rank in range(1, 5) for point in curves_of(f"lora-{rank}", "lora", [3.0, 2.0 - rank / 10])]
    curves += curves_of("lora_fa-1", "lora_fa", [3.0, 2.9])
    comparison = comparison_of([*unfinished, done], curves)
    labels = [line.label for line in group_by_setting(comparison)][:5]
    assert labels == ["2.900  lora_fa  rank 1", *(f"killed  lora  rank {rank}" for rank in (4, 3, 2, 1))]

    legends: list[Legend] = []
    add = Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda self, *a, **k: legends.append(add(self, *a, **k)))
    plot_loss_curves(comparison, tmp_path / "curves.png")
    assert [text.get_text() for text in legends[0].get_texts()] == labels[:3]
    assert legends[0].get_title().get_text() == "final evaluation loss\nthe lowest 3; 2 others in grey"


def test_a_line_and_its_label_show_the_mean_over_seeds() -> None:
    rows: list[dict[str, Any]] = [
        {"trial_id": f"lora-{rank}-{seed}", "method": "lora", "rank": rank, "seed": seed, "eval/final_loss": loss}
        for rank, seed, loss in [(4, 0, 3.0), (4, 1, 2.0), (8, 0, 2.25), (8, 1, 2.25)]
    ]
    rows.append({"trial_id": "vera-64-0", "method": "vera", "rank": 64, "seed": 0, "status": "FAILED", "reason": "x"})
    settings = group_by_setting(comparison_of(rows))
    assert [setting.label for setting in settings] == [
        "2.250  lora  rank 8",
        "2.500  lora  rank 4",
        "failed  vera  rank 64",
    ]
    assert set(settings[1].trial_ids) == {"lora-4-0", "lora-4-1"}
    assert settings[0].colour == settings[1].colour != settings[2].colour
    assert settings[0].line_style != settings[1].line_style


def test_settings_of_equal_method_and_rank_differ_in_marker() -> None:
    rows = [
        {"trial_id": f"t{ratio}", "method": "lora_plus", "rank": 8, "lr_ratio": ratio, "eval/final_loss": ratio}
        for ratio in (4.0, 16.0)
    ]
    settings = group_by_setting(comparison_of(rows))
    assert [setting.label for setting in settings] == [
        "4.000  lora_plus  rank 8, lr_ratio 4",
        "16.000  lora_plus  rank 8, lr_ratio 16",
    ]
    assert settings[0].marker != settings[1].marker


def test_a_sweep_without_losses_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sweep 'first' of 'quickstart' has no loss curve yet"):
        plot_loss_curves(comparison_of(ROWS), tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
    accuracies = comparison_of(ROWS, [("lora-1", "lora", 0, "eval/accuracy", 0.5)])
    assert not has_losses(accuracies), "a curve, but none of a loss"
    assert has_losses(comparison_of(ROWS, [("lora-1", "lora", 0, "train/loss", 3.0)]))


def test_a_diverging_trial_does_not_press_the_others_flat(tmp_path: Path) -> None:
    curves = [
        *curves_of("lora-1", "lora", [3.0 - 0.05 * step for step in range(20)]),
        *curves_of("lora_plus-1", "lora_plus", [3.0 - 0.06 * step for step in range(19)] + [4000.0]),
    ]
    flat = plot_loss_curves(comparison_of(ROWS, curves), tmp_path / "diverging.png")
    calm = plot_loss_curves(comparison_of(ROWS, [c for c in curves if c[4] < 100]), tmp_path / "calm.png")

    def height_of_the_first_line(path: Path) -> int:
        pixels = (matplotlib.image.imread(path)[:, : 13 * 130 // 3, :3] * 255).round()
        rows = (abs(pixels - [0xD5, 0x5E, 0x00]).sum(axis=2) < 3).any(axis=1).nonzero()[0]
        return int(rows.max() - rows.min())

    assert height_of_the_first_line(flat) > 0.6 * height_of_the_first_line(calm)


def test_shared_jumps_stay_visible_and_diverged_trials_are_counted() -> None:
    together = [pd.Series([5.0, 9.0, 4.0, 3.0]), pd.Series([5.0, 9.5, 4.5, 3.5])]
    panel = Figure().subplots()
    for curve in together:
        panel.plot(curve.index, curve)
    assert _limit_height(panel, together) == 0
    assert panel.get_ylim()[1] > 9.5
    assert _limit_height(panel, [*together, pd.Series([5.0, 50.0, 400.0])]) == 1
    assert 9.5 < panel.get_ylim()[1] < 50
    assert _limit_height(panel, []) == 0


def test_early_stopped_trials_are_counted_by_rung() -> None:
    reasons = ["stopped early at rung 1 (step 3): eval/loss 4.1 is number 3 of 4, 2 continue"] * 2
    reasons.append("stopped early at rung 2 (step 9): eval/loss 3.5 is number 2 of 2, 1 continue")
    stopped = [
        {"trial_id": f"lora-{index}", "method": "lora", "rank": 8, "status": "KILLED", "reason": reason}
        for index, reason in enumerate(reasons)
    ]
    interrupted = {"trial_id": "vera-9", "method": "vera", "rank": 4, "status": "KILLED", "reason": "interrupted"}
    lines = text_of(comparison_of([*ROWS[:1], *stopped, interrupted]))
    assert lines[0].strip() == "quickstart  first, 5 trials, 1 killed, 3 stopped early"
    assert sum(line.startswith("lora") and "stopped" in line for line in lines) == 3
    assert "2 trials stopped early at rung 1 (step 3)" in lines
    assert "1 trial stopped early at rung 2 (step 9)" in lines
    assert "vera-9 killed: interrupted" in lines
    assert not any("number 3 of 4" in line for line in lines)
