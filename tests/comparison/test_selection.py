"""The choice of each method's setting on the evaluation rows, in comparisons with known values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from loragrid.comparison.choice import Choice
from loragrid.comparison.selection import choose
from loragrid.comparison.settings import settings_of, tasks_of
from loragrid.comparison.sweep_record import SweepRecord
from loragrid.comparison.table import Comparison
from loragrid.comparison.verdict import judge
from loragrid.report.choice_tables import choice_table
from loragrid.report.html_page import Part, figures_by_method, render_page, setting_points
from loragrid.report.tables import Cell
from loragrid.sweep.record import sweep_parameters
from loragrid.tracking.store_uri import format_parameter
from loragrid.trials.load import experiment_from_mapping
from tests.support.comparisons import made_up_comparison

AXES = {
    "rank": "method.rank",
    "lr_ratio": "method.lr_ratio",
    "dropout": "method.dropout",
    "lr": "training.lr",
    "steps": "training.steps",
    "model.name": "model.name",
    "seed": "seed",
}
DIVERGED = {"status": "FAILED", "reason": "diverged: loss or gradient not finite at step 7", "eval/final_loss": None}
STOPPED = {"status": "KILLED", "reason": "stopped early at rung 1 (step 3): eval/loss 4.1", "eval/final_loss": None}
LOST = {"status": "FAILED", "reason": "the worker died", "eval/final_loss": None}


def comparison_of(rows: Sequence[Mapping[str, Any]]) -> Comparison:
    return made_up_comparison(rows, AXES, experiment_name="tuned")


def trials(method: str, losses: Sequence[float], test: float | None = None, **values: Any) -> list[dict[str, Any]]:
    """One trial per loss, on seeds 0, 1, ...; the test loss of a seed is `test` plus 0.01 times the seed."""
    return [
        {
            "method": method,
            **values,
            "seed": seed,
            "eval/final_loss": loss,
            **({} if test is None else {"test/loss": test + 0.01 * seed}),
        }
        for seed, loss in enumerate(losses)
    ]


def default_cell_of(comparison: Comparison) -> Cell:
    """The report's cell beside the only choice, under "untuned default"."""
    table = choice_table(judge(comparison), comparison)
    return table.rows[0][table.header.index("untuned default")]


def only_choice(comparison: Comparison) -> Choice:
    (choice,) = choose(comparison).choices
    return choice


def test_a_setting_has_its_methods_varying_values_and_all_seeds() -> None:
    rows = [
        *trials("lora", [2.0, 2.1], rank=8, lr=1e-3),
        *trials("lora", [2.2, 2.3], rank=8, lr=1e-2),
        *trials("vera", [2.5, 2.6], rank=64, lr=1e-2),
        *trials("full", [2.5, 2.6], rank=None, lr=1e-5),
    ]
    rows[3] |= LOST
    settings = settings_of(comparison_of(rows))
    assert [(s.method, dict(s.values), s.num_trials) for s in settings] == [
        ("lora", {"lr": 1e-3}, 2),
        ("lora", {"lr": 1e-2}, 2),
        ("vera", {}, 2),
        ("full", {}, 2),
    ]
    assert settings[0].trial_ids == {0: "lora-0", 1: "lora-1"}
    assert settings[1].trial_ids == {0: "lora-2"}


def test_a_missing_value_separates_settings() -> None:
    rows = [*trials("lora", [2.0], rank=8, lr=0.5), *trials("lora", [2.0], rank=8, lr=None)]
    assert [dict(s.values) for s in settings_of(comparison_of(rows))] == [{"lr": 0.5}, {"lr": None}]


def test_the_lowest_mean_evaluation_loss_is_chosen_and_tested() -> None:
    rows = [
        *trials("lora", [2.0, 2.4], test=2.30, lr=1e-4),
        *trials("lora", [2.1, 2.1], test=2.25, lr=1e-3),
        *trials("lora", [1.9, 2.6], test=2.50, lr=1e-2),
    ]
    selection = choose(comparison_of(rows))
    (choice,) = selection.choices
    assert choice.setting.values == {"lr": 1e-3}
    assert (selection.metric, selection.reported, selection.higher_is_better) == ("eval/final_loss", "test/loss", False)
    assert (choice.metric, choice.num_settings) == ("eval/final_loss", 3)
    assert choice.evaluation.mean == pytest.approx(2.1)
    assert choice.test is not None
    assert choice.test.mean == pytest.approx(2.255)
    assert choice.test.num == 2
    assert selection.warnings == ()


def test_a_lucky_choice_is_reported_with_its_test_figure() -> None:
    """Test rows do not decide the choice, and the flattering evaluation figure does not replace the test figure."""
    rows = [*trials("lora", [1.5, 1.5], test=2.6, lr=1e-4), *trials("lora", [2.1, 2.1], test=2.2, lr=1e-3)]
    choice = only_choice(comparison_of(rows))
    assert choice.setting.values == {"lr": 1e-4}
    assert choice.test is not None
    assert choice.test.mean == pytest.approx(2.605)


def test_accuracy_goes_before_loss_and_more_of_it_is_better() -> None:
    rows = [*trials("lora", [2.0], lr=1e-4), *trials("lora", [2.2], lr=1e-3), *trials("vera", [2.2], lr=1e-2)]
    for row, accuracy, on_test in zip(rows, (0.25, 0.5, 0.75), (0.3, 0.4, 0.6), strict=True):
        row |= {"eval/accuracy": accuracy, "test/accuracy": on_test, "test/loss": 1.0}
    selection = choose(comparison_of(rows))
    assert (selection.metric, selection.reported) == ("eval/accuracy", "test/accuracy")
    assert selection.higher_is_better
    assert [choice.method for choice in selection.choices] == ["vera", "lora"]
    assert selection.choices[1].setting.values == {"lr": 1e-3}


def test_equal_accuracies_are_told_apart_by_loss() -> None:
    rows = [*trials("lora", [2.0], lr=1e-4), *trials("lora", [1.9], lr=1e-3)]
    for row in rows:
        row["eval/accuracy"] = 0.5
    assert only_choice(comparison_of(rows)).setting.values == {"lr": 1e-3}


def test_choices_without_test_rows_are_called_flattered() -> None:
    chosen = choose(comparison_of([*trials("lora", [2.0], lr=1e-4), *trials("lora", [1.9], lr=1e-3)]))
    assert chosen.reported == "eval/final_loss"
    assert chosen.choices[0].test is None
    assert any("no test rows" in warning and "flatters" in warning for warning in chosen.warnings)
    assert choose(comparison_of([*trials("lora", [2.0]), *trials("vera", [1.9])])).warnings == ()


@pytest.mark.parametrize(("fault", "word"), [(DIVERGED, "diverged"), (STOPPED, "was stopped early")])
def test_a_setting_does_not_win_by_the_seeds_that_survived(fault: dict[str, Any], word: str) -> None:
    rows = [*trials("lora", [1.5, 1.5, 1.5], lr=1e-2), *trials("lora", [2.0, 2.0, 2.0], lr=1e-3)]
    rows[1] |= fault
    selection = choose(comparison_of(rows))
    assert selection.choices[0].setting.values == {"lr": 1e-3}
    (warning,) = [warning for warning in selection.warnings if "not chosen" in warning]
    assert "lora: lr 0.01 looks better on 2 of 3 seeds" in warning
    assert word in warning


def test_a_method_with_only_diverged_settings_has_no_choice() -> None:
    rows = [*trials("lora", [2.0, 2.0], lr=1e-2), *trials("vera", [2.5, 2.5], lr=1e-2)]
    rows[0] |= DIVERGED
    selection = choose(comparison_of(rows))
    assert [choice.method for choice in selection.choices] == ["vera"]
    assert "lora: no setting can be chosen: each of its settings has a trial that diverged" in selection.warnings


def test_an_incomplete_setting_cannot_beat_a_complete_one() -> None:
    rows = [*trials("lora", [1.5, 1.5, 1.5], lr=1e-2), *trials("lora", [2.0, 2.0, 2.0], lr=1e-3)]
    rows[2] |= LOST
    selection = choose(comparison_of(rows))
    assert selection.choices[0].setting.values == {"lr": 1e-3}
    assert any("looks better on 2 of 3 seeds, but the others are missing" in warning for warning in selection.warnings)
    # The same if the third seed was never run.
    assert only_choice(comparison_of([*rows[:2], *rows[3:]])).setting.values == {"lr": 1e-3}


def test_the_most_complete_settings_compete_if_none_is_complete() -> None:
    rows = [*trials("lora", [1.5, 1.5, 1.5], lr=1e-2), *trials("lora", [2.0, 2.0, 2.0], lr=1e-3)]
    for i in (0, 1, 5):
        rows[i] |= LOST
    selection = choose(comparison_of(rows))
    assert selection.choices[0].setting.values == {"lr": 1e-3}
    assert selection.choices[0].evaluation.num == 2
    assert "lora: no setting has finished on all 3 seeds; chosen among those with 2" in selection.warnings


def test_unfinished_methods_are_named_and_empty_sweeps_are_empty() -> None:
    rows = [{**trial, "status": "RUNNING", "eval/final_loss": None} for trial in trials("lora", [2.0])]
    selection = choose(comparison_of([*rows, *trials("vera", [2.0])]))
    assert "lora: no setting can be chosen: none of its trials has finished" in selection.warnings
    empty = choose(comparison_of(trials("lora", [2.0])[:1]))
    assert empty.choices[0].evaluation.num == 1
    nan = choose(comparison_of(trials("lora", [math.nan, math.inf])))
    assert nan.choices == ()


@pytest.mark.parametrize(
    ("losses", "side"),
    [([1.9, 2.0, 2.1], "lowest"), ([2.0, 1.9, 2.1], None), ([2.1, 2.0, 1.9], "highest"), ([2.0, 1.9], "highest")],
)
def test_a_best_learning_rate_at_a_ladders_end_is_marked(losses: list[float], side: str | None) -> None:
    rows = [
        trial for lr, loss in zip((1e-4, 1e-3, 1e-2), losses, strict=False) for trial in trials("lora", [loss], lr=lr)
    ]
    choice = only_choice(comparison_of(rows))
    assert choice.edge_sides == ({} if side is None else {"lr": side})
    assert choice.edges == ({} if side is None else {"lr": choice.setting.values["lr"]})


def test_a_ladder_holds_only_settings_with_equal_other_values() -> None:
    """At rank 8 the best lr has neighbours on both sides; rank 64, which has one lr, does not count."""
    rows = [
        trial
        for rank, lr, loss in [(8, 1e-4, 2.1), (8, 1e-3, 1.9), (8, 1e-2, 2.0), (64, 1e-2, 2.2), (64, 1e-1, 2.3)]
        for trial in trials("lora", [loss], rank=rank, lr=lr)
    ]
    assert only_choice(comparison_of(rows)).edges == {}
    rows[3]["eval/final_loss"] = 1.8
    assert only_choice(comparison_of(rows)).edge_sides == {"lr": "lowest"}


def test_a_diverged_neighbour_bounds_a_ladder_a_missing_does_not() -> None:
    rows = [*trials("lora", [2.0], lr=1e-4), *trials("lora", [1.9], lr=1e-3), *trials("lora", [9.0], lr=1e-2)]
    rows[2] |= DIVERGED
    assert only_choice(comparison_of(rows)).edges == {}
    rows[2] |= LOST
    assert only_choice(comparison_of(rows)).edge_sides == {"lr": "highest"}


def test_ranks_steps_and_a_dropout_of_nothing_are_no_edges() -> None:
    ranks = [*trials("lora", [2.0], rank=8, steps=10), *trials("lora", [1.9], rank=64, steps=20)]
    assert only_choice(comparison_of(ranks)).edges == {}
    dropouts = [*trials("lora", [1.9], dropout=0.0), *trials("lora", [2.0], dropout=0.1)]
    assert only_choice(comparison_of(dropouts)).edges == {}
    ratios = [*trials("lora_plus", [1.9], lr_ratio=1.0), *trials("lora_plus", [2.0], lr_ratio=4.0)]
    assert only_choice(comparison_of(ratios)).edge_sides == {"lr_ratio": "lowest"}


def test_a_ladder_of_whole_learning_rates_is_one() -> None:
    rows = [trial for lr, loss in [(1, 2.2), (2, 2.1), (4, 1.9)] for trial in trials("lora", [loss], lr=lr)]
    comparison = comparison_of(rows)
    comparison.table["lr"] = comparison.table["lr"].astype("Int64")
    assert only_choice(comparison).edge_sides == {"lr": "highest"}
    ratios = [trial for ratio, loss in [(1, 1.9), (4, 2.0)] for trial in trials("lora_plus", [loss], lr_ratio=ratio)]
    assert only_choice(comparison_of(ratios)).edge_sides == {"lr_ratio": "lowest"}


def experiment_over_ranks(ranks: object, **method: object) -> dict[str, str]:
    """The recorded parameters of a sweep over these ranks."""
    experiment = experiment_from_mapping(
        {
            "name": "ranks",
            "model": {"name": "smollm2-135m-instruct"},
            "data": {"name": "chitchat"},
            "training": {"steps": 2},
            "methods": [{"name": "lora", **method}, "vera"],
            "grid": {"method.rank": ranks},
        },
        "f.yaml",
    )
    return {key: format_parameter(value) for key, value in sweep_parameters(experiment).items()}


LADDER = {"ladder": [4, 64], "points": 3}


@pytest.mark.parametrize(
    ("ranks", "block", "is_ladder"),
    [
        ([4, 16, 64], {}, False),
        (LADDER, {}, True),
        (LADDER, {"grid": {"rank": [4, 16, 64]}}, False),
        ([8, 16], {"grid": {"rank": LADDER}}, True),
        (LADDER, {"label": "twin"}, True),
        ([8, 16], {"grid": {"rank": LADDER}, "label": "other"}, False),
    ],
)
def test_ranks_have_edges_only_if_written_as_ladder(ranks: object, block: dict[str, object], is_ladder: bool) -> None:
    label = "twin" if block.get("label") == "twin" else "lora"
    rows = [trial for rank, loss in [(4, 2.1), (16, 2.0), (64, 1.9)] for trial in trials(label, [loss], rank=rank)]
    comparison = replace(comparison_of(rows), sweep_parameters=experiment_over_ranks(ranks, **block))
    assert only_choice(comparison).edge_sides == ({"rank": "highest"} if is_ladder else {})
    best_inside = replace(comparison, table=comparison.table.assign(**{"eval/final_loss": [2.1, 1.8, 1.9]}))
    assert only_choice(best_inside).edge_sides == {}


def test_an_experiment_with_cut_parameters_has_no_own_ladders() -> None:
    rows = [trial for rank, loss in [(4, 2.1), (64, 1.9)] for trial in trials("lora", [loss], rank=rank)]
    parameters = {"methods": '[{"name": "lora", "grid": {"rank": {"lad…', "grid.method.rank": '{"ladder": [4, 6…'}
    assert only_choice(replace(comparison_of(rows), sweep_parameters=parameters)).edge_sides == {}


def test_the_untuned_default_stands_beside_the_choice() -> None:
    rows = [
        trial
        for rank, lr, loss in [(8, 1e-3, 2.2), (8, 1e-2, 2.1), (64, 1e-3, 2.0), (64, 1e-2, 1.9)]
        for trial in trials("lora", [loss], test=loss + 0.1, rank=rank, lr=lr)
    ]
    choice = only_choice(comparison_of(rows))
    assert choice.setting.values == {"rank": 64, "lr": 1e-2}
    assert choice.default is not None
    assert choice.default.setting.values == {"rank": 8, "lr": 1e-3}  # LoRA's rank and `training.lr` if not set
    assert choice.default.test is not None
    assert choice.default.test.mean == pytest.approx(2.3)
    vera = [{**row, "method": "vera"} for row in rows]
    assert only_choice(comparison_of(vera)).default is None  # VeRA's rank is 256, which is not in the sweep
    ratios = [*trials("lora_plus", [1.9], lr_ratio=4.0), *trials("lora_plus", [2.0], lr_ratio=16.0)]
    default = only_choice(comparison_of(ratios)).default
    assert default is not None
    assert default.setting.values == {"lr_ratio": 16.0}


def test_axes_without_default_keep_the_chosen_value() -> None:
    rows = [
        trial
        for steps, lr, loss in [(10, 1e-3, 2.2), (10, 1e-2, 2.1), (20, 1e-3, 2.0), (20, 1e-2, 1.9)]
        for trial in trials("lora", [loss], steps=steps, lr=lr)
    ]
    default = only_choice(comparison_of(rows)).default
    assert default is not None
    assert default.setting.values == {"steps": 20, "lr": 1e-3}
    gone = [{**row, "method": "of_last_year"} for row in rows]
    assert only_choice(comparison_of(gone)).default is not None


def test_a_labelled_methods_default_is_that_of_the_method() -> None:
    rows = [row for rank in (4, 8) for row in trials("rsLoRA", [2.0 + rank], test=2.0, rank=rank)]
    comparison = comparison_of(rows)
    chosen = only_choice(comparison).default  # there is no such method, so its rank has no default
    assert chosen is not None
    assert chosen.setting.values == {"rank": 4}
    default = only_choice(replace(comparison, methods={"rsLoRA": "lora"})).default
    assert default is not None
    assert default.setting.values == {"rank": 8}


def test_a_default_that_diverged_is_told() -> None:
    rows = [*trials("lora", [2.0], lr=1e-4), *trials("lora", [1.9], lr=1e-3)]
    rows[1] |= DIVERGED
    selection = choose(comparison_of(rows))
    assert selection.choices[0].default is None
    assert "lora: its default is lr 0.001: one of its trials diverged" in selection.warnings
    assert default_cell_of(comparison_of(rows)) == Cell(text="–", notes=("one of its trials diverged",), is_number=True)


def test_a_default_never_shows_evaluation_as_test_figure() -> None:
    rows = [*trials("lora", [1.9], test=1.95, lr=1e-4), *trials("lora", [2.0], lr=1e-3)]
    cell = default_cell_of(comparison_of(rows))
    assert (cell.text, cell.notes) == ("–", ("lr 0.001",))


def test_no_default_is_missed_if_nothing_was_chosen() -> None:
    assert default_cell_of(comparison_of(trials("lora", [2.0], lr=1e-3))).notes == ("nothing was chosen",)
    others = [*trials("lora", [2.0], lr=1e-4), *trials("lora", [1.9], lr=1e-2)]
    assert default_cell_of(comparison_of(others)).notes == ("not in the sweep",)


def test_a_method_that_trains_nothing_is_a_reference() -> None:
    rows = [*trials("frozen", [1.0]), *trials("lora", [2.0]), *trials("of_my_own", [2.5])]
    for row, count in zip(rows, (0, 1000, 0), strict=True):
        row["parameters/trainable"] = count
    selection = choose(comparison_of(rows))
    assert [choice.method for choice in selection.choices] == ["lora"]
    assert [choice.method for choice in selection.references] == ["frozen", "of_my_own"]


def test_axes_asked_to_stay_apart_make_contestants_of_their_own() -> None:
    rows = [
        trial
        for rank, lr, loss in [(8, 1e-3, 2.2), (8, 1e-2, 2.1), (64, 1e-3, 2.0), (64, 1e-2, 1.9)]
        for trial in trials("lora", [loss], rank=rank, lr=lr)
    ]
    rows += trials("vera", [2.05], rank=256, lr=1e-2)
    selection = choose(comparison_of(rows), apart=["rank"])
    assert [choice.name for choice in selection.choices] == ["lora rank 64", "vera", "lora rank 8"]
    first = selection.choices[0]
    assert (first.num_settings, first.edge_sides) == (2, {"lr": "highest"})
    assert first.default is not None
    assert first.default.setting.values == {"rank": 64, "lr": 1e-3}
    with pytest.raises(ValueError, match=r"apart: 'alpha' is no axis of this sweep; allowed: rank, lr"):
        choose(comparison_of(rows), apart=["alpha"])


def test_several_tasks_are_refused_and_judged_one_by_one() -> None:
    rows = [
        {**trial, "model.name": model}
        for model, loss in (("small", 3.0), ("large", 2.0))
        for trial in (*trials("lora", [loss], lr=1e-3), *trials("lora", [loss + 0.1], lr=1e-2))
    ]
    comparison = comparison_of(rows)
    with pytest.raises(ValueError, match=r"varies model\.name"):
        choose(comparison)
    tasks = tasks_of(comparison)
    assert list(tasks) == ["model.name small", "model.name large"]
    assert [only_choice(task).evaluation.mean for task in tasks.values()] == [3.0, 2.0]
    assert tasks_of(tasks["model.name small"]) == {"": tasks["model.name small"]}


def part_of(comparison: Comparison, apart: Sequence[str] = ()) -> Part:
    return Part(
        label="", comparison=comparison, settings=settings_of(comparison), verdict=judge(comparison, None, apart)
    )


def test_charts_leave_out_settings_that_lack_seeds() -> None:
    rows = [*trials("lora", [2.0, 2.1], lr=1e-4), *trials("lora", [1.0, 9.0], lr=1e-3)]
    rows[3] |= DIVERGED
    part = part_of(comparison_of(rows))
    assert [(point.label, point.is_chosen) for point in setting_points(part)] == [("lora lr 0.0001", True)]
    assert figures_by_method(part, "eval/final_loss") == {
        "lora": [({"lr": 1e-4}, pytest.approx(2.05)), ({"lr": 1e-3}, None)]
    }
    ranks = [*trials("lora", [2.0, 2.1], rank=8), *trials("lora", [2.2, 2.3], rank=16)]
    ranks[3] |= LOST
    points = setting_points(part_of(comparison_of(ranks), ["rank"]))
    assert [(point.name, point.is_chosen) for point in points] == [("lora rank 8", True), ("lora rank 16", True)]


def test_accuracy_charts_prefer_higher_even_if_loss_is_reported() -> None:
    rows = [*trials("lora", [2.0], test=2.0), *trials("vera", [2.0], test=2.1)]
    for row, accuracy, size in zip(rows, (0.4, 0.3), (100, 100), strict=True):
        row |= {"eval/accuracy": accuracy, "parameters/trainable": size}
    comparison = comparison_of(rows)
    record = SweepRecord(
        comparison=comparison,
        trials={},
        experiment_yaml=None,
        is_rebuilt=False,
        status="FINISHED",
        started=None,
        ended=None,
    )
    page = render_page(record, [part_of(comparison)])
    assert "On the front: lora (100, 40.0 %)." in page
