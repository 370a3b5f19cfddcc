"""The retention table: what the path reached, how far the end is above it, and the held-out text at each."""

from typing import Any

from loragrid.comparison.table import Comparison
from loragrid.report.retention_table import retention_table
from tests.support.comparisons import made_up_comparison

CHOICES = [("lora", ["lora-0", "lora-1"]), ("vera", ["vera-2"])]


def comparison(num_evaluations: int, *, is_held_out: bool = True, has_steps: bool = True) -> Comparison:
    """Two seeds of LoRA that overshoot, and a VeRA that does not."""
    rows: list[dict[str, Any]] = []
    for method, best, final, step in (("lora", 1.0, 1.5, 40), ("lora", 1.25, 1.75, 60), ("vera", 2.0, 2.0, 80)):
        row = {"method": method, "eval/best_loss": best, "eval/final_loss": final}
        row |= {"eval/best_step": step, "eval/overshoot": final - best} if has_steps else {}
        if is_held_out:
            row |= {"forgetting/base_loss": 3.0, "forgetting/loss": 3.5 + best, "forgetting/best_step_loss": 3.25}
        rows.append(row)
    curves = [
        (f"{row['method']}-{i}", str(row["method"]), 20 * step, "eval/loss", 1.0)
        for i, row in enumerate(rows)
        for step in range(num_evaluations)
    ]
    return made_up_comparison(rows, {}, curves)


def test_every_choice_has_its_best_final_and_held_out_losses() -> None:
    table = retention_table(comparison(5), CHOICES)
    assert table.header == (
        "method",
        "lowest eval loss on the path",
        "final eval loss",
        "final above lowest",
        "held-out text, before",
        "held-out text, at the lowest",
        "held-out text, final",
    )
    lora, vera = ([cell.text for cell in row] for row in table.rows)
    assert lora == ["lora", "1.1250", "1.6250", "+0.5000", "3.0000", "3.2500", "4.6250"]
    assert vera == ["vera", "2.0000", "2.0000", "+0.0000", "3.0000", "3.2500", "5.5000"]
    assert [row[1].notes for row in table.rows] == [("steps 40 to 60",), ("step 80",)]


def test_columns_without_figures_are_left_out() -> None:
    assert [cell.text for cell in retention_table(comparison(2), CHOICES).rows[0]] == ["lora", "3.0000", "4.6250"]
    assert len(retention_table(comparison(5, is_held_out=False), CHOICES).header) == 4
    assert retention_table(comparison(2, is_held_out=False), CHOICES).rows == ()


def test_a_sweep_recorded_before_the_steps_has_dashes() -> None:
    row = retention_table(comparison(5, has_steps=False), CHOICES).rows[0]
    assert [cell.text for cell in row][:4] == ["lora", "1.1250", "1.6250", "–"]
    assert row[1].notes == ()
