"""Settings are chosen on the grid's trials alone; the trials of fresh seeds are a comparison of their own."""

from collections.abc import Mapping
from typing import Any

import pytest

from loragrid.comparison.phases import is_confirming, split_phases
from loragrid.comparison.ranking import best_trial
from loragrid.comparison.selection import choose
from loragrid.comparison.table import Comparison, load_comparison
from loragrid.report.tables import trial_table
from loragrid.report.terminal import render_table
from loragrid.sweep.summary import summary_metrics
from loragrid.tracking.recorder import Recorder
from loragrid.trials.tags import PHASE_TAG
from tests.support.comparisons import made_up_comparison

AXES = {"rank": "method.rank", "lr": "training.lr", "seed": "seed"}


def trial(method: str, lr: float, seed: int, loss: float, phase: str | None = None, **more: Any) -> dict[str, Any]:
    name = f"{method}-{lr:g}-{seed}"
    figures = {"eval/final_loss": loss, "test/loss": loss + 1}
    return {"trial_id": name, "method": method, "lr": lr, "seed": seed, **figures, "own phase": phase, **more}


def comparison_of(rows: list[dict[str, Any]]) -> Comparison:
    tags: Mapping[str, Mapping[str, str]] = {
        row["trial_id"]: {} if row["own phase"] is None else {PHASE_TAG: row["own phase"]} for row in rows
    }
    return made_up_comparison(
        [{key: value for key, value in row.items() if key != "own phase"} for row in rows],
        AXES,
        [(row["trial_id"], row["method"], 0, "eval/loss", 3.0) for row in rows],
        tags=tags,
    )


GRID = [trial("lora", lr, 0, loss, "tune") for lr, loss in ((1e-3, 2.0), (1e-2, 2.2))] + [
    trial("vera", 1e-1, 0, 2.5, "tune")
]
FRESH = [trial("lora", 1e-3, seed, 2.1 + seed / 10, "confirm") for seed in (1, 2, 3)]


def test_both_parts_keep_the_axes_of_the_sweep() -> None:
    whole = comparison_of([*GRID, *FRESH])
    tune, confirm = split_phases(whole)
    assert confirm is not None
    assert list(tune.table["trial_id"]) == [row["trial_id"] for row in GRID]
    assert list(confirm.table["trial_id"]) == [row["trial_id"] for row in FRESH]
    assert tune.axes == confirm.axes == whole.axes == {"lr": "training.lr", "seed": "seed"}
    for part in (tune, confirm):
        assert set(part.curves["trial_id"]) == set(part.tags) == set(part.table["trial_id"])
        assert list(part.table.columns) == list(whole.table.columns)


def test_more_seeds_of_a_confirmed_setting_do_not_choose_it() -> None:
    worse = [trial("lora", 1e-2, seed, 2.1, "confirm") for seed in (1, 2, 3)]
    assert choose(comparison_of([*GRID, *worse])).choices[0].setting.values == {"lr": 1e-3}
    as_one_phase = comparison_of([*GRID, *({**row, "own phase": "tune"} for row in worse)])
    assert choose(as_one_phase).choices[0].setting.values == {"lr": 1e-2}, "a setting with more seeds wins"


def test_old_stores_have_one_phase() -> None:
    old = comparison_of([row | {"own phase": None} for row in GRID])
    assert split_phases(old) == (old, None)
    assert not is_confirming(old, "lora-0.001-0")


def test_the_choice_reports_its_fresh_seeds_alone() -> None:
    vera, lora = sorted(choose(comparison_of([*GRID, *FRESH])).choices, key=lambda choice: choice.method, reverse=True)
    assert lora.reported_trials == {seed: f"lora-0.001-{seed}" for seed in (1, 2, 3)}
    assert lora.setting.trial_ids == {0: "lora-0.001-0"}
    assert lora.test is not None
    assert lora.test.mean == pytest.approx(3.3), "of the fresh seeds, not 3.0 of the seed that chose"
    assert (vera.reported_trials, vera.test) == ({}, None), "it was not trained again"


def test_a_fresh_seed_that_failed_is_no_trial_of_the_choice() -> None:
    lost = FRESH[0] | {"status": "FAILED", "reason": "the worker died"}
    choices = choose(comparison_of([*GRID, lost, *FRESH[1:]])).choices
    assert [set(choice.reported_trials) for choice in choices if choice.method == "lora"] == [{2, 3}]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The trials of `GRID` and `FRESH`, read from a store."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('phased') / 'mlflow.db'}"
    recorder = Recorder("phased", uri)
    recorder.start_sweep("phased-1", {}, {})
    for row in [*GRID, *FRESH]:
        parameters = {"method.name": row["method"], "training.lr": row["lr"], "seed": row["seed"]}
        recorder.start_trial(row["trial_id"], parameters, {PHASE_TAG: row["own phase"]})
        recorder.log_summary(row["trial_id"], {"eval/final_loss": row["eval/final_loss"]})
        recorder.end_trial(row["trial_id"], "FINISHED")
    recorder.end_sweep("FINISHED")
    return load_comparison("phased", uri)


def test_tables_and_csv_name_the_phase(recorded: Comparison) -> None:
    expected = ["tune"] * len(GRID) + ["confirm"] * len(FRESH)
    assert list(recorded.table["phase"]) == expected
    assert "phase" not in recorded.metric_keys
    assert recorded.to_csv().splitlines()[0].startswith("trial_id,status,method,phase,lr,seed,")
    table = render_table(recorded)
    headers = [column.header for column in table.columns]
    assert [getattr(cell, "plain", "") for cell in table.columns[headers.index("phase")].cells].count("confirm") == 3
    page = trial_table(recorded, {})
    assert [row[page.header.index("phase")].text for row in page.rows].count("tune") == 3
    tune, confirm = split_phases(recorded)
    assert confirm is not None
    assert "phase" not in tune.table
    assert "phase" not in confirm.table
    assert "phase" not in [column.header for column in render_table(tune).columns]


def test_the_summary_counts_trials_that_confirm(recorded: Comparison) -> None:
    found = summary_metrics(recorded, "")
    assert (found["sweep/trials_finished"], found["sweep/trials_confirming"]) == (6.0, 3.0)
    assert "sweep/trials_confirming" not in summary_metrics(split_phases(recorded)[0], "")


def test_the_best_trial_may_be_one_that_confirms() -> None:
    lucky = [*FRESH[:2], trial("lora", 1e-3, 3, 1.0, "confirm")]
    assert best_trial(comparison_of([*GRID, *FRESH])) == "lora-0.001-0"
    assert best_trial(comparison_of([*GRID, *lucky])) == "lora-0.001-3"
