"""What a plan says about early stopping: settings left at each rung, and what that costs the verdict."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import loragrid as lg
from loragrid.cli.plan_table import render_plan
from loragrid.planning.early_stopping import early_stopping_notes, early_stopping_sentences
from loragrid.planning.placement import Node
from loragrid.planning.plan import Plan, plan
from loragrid.planning.time_estimate import plan_on

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
GRID = {"training.lr": RATES, "seed": [0, 1, 2]}


@pytest.fixture
def made(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Any:
    def make(halving: dict[str, Any] | None, grid: dict[str, Any] = GRID, methods: Any = ("lora", "vera")) -> Plan:
        return plan(
            lg.Experiment(
                name="halving",
                model={"name": str(tiny_gpt2_dir)},
                data={"name": str(chat_jsonl), "max_length": 96},
                training={"steps": 30},
                methods=list(methods),
                grid=grid,
                early_stopping=halving,
            )
        )

    return make


def test_every_rungs_settings_are_counted(made: Any) -> None:
    assert early_stopping_sentences(made(None)) == []
    methods = ["lora", {"name": "vera", "grid": {"rank": [4, 8]}}]
    of_both = "early stopping by the mean of eval/loss over seeds: "
    assert early_stopping_sentences(made({"grace_steps": 2}, methods=methods)) == [
        f"{of_both}lora: 5 settings, 1 after step 2, 1 after step 6, 1 after step 18, to step 30",
        f"{of_both}vera: 10 settings, 3 after step 2, 1 after step 6, 1 after step 18, to step 30",
    ]
    (together,) = early_stopping_sentences(made({"grace_steps": 10, "within": "sweep"}))
    assert together.endswith("all methods: 10 settings, 3 after step 10, to step 30")


def test_a_plan_that_can_give_a_verdict_has_no_notes(made: Any) -> None:
    assert early_stopping_notes(made(None)) == []
    assert early_stopping_notes(made({"grace_steps": 2})) == []


@pytest.mark.parametrize(
    ("halving", "grid", "note"),
    [
        (
            {"within": "sweep"},
            GRID,
            "early_stopping.within: sweep ranks the settings of all 2 methods together, so methods may be left without "
            "a verdict; allowed: method, which keeps a setting of each",
        ),
        (
            {"reduction_factor": 6},
            GRID,
            "lora, vera: fewer settings than early_stopping.reduction_factor 6, so the first rung leaves one",
        ),
        (
            {},
            GRID | {"seed": [0, 1]},
            "early stopping ranks each setting on 2 seeds, and with fewer than 3 nothing can be claimed about methods; "
            "grid.seed sets more, and confirm: adds fresh ones",
        ),
        (
            {},
            {"seed": [0, 1, 2]},
            "early stopping stops nothing: every method has one setting, and seeds of a setting end together",
        ),
    ],
)
def test_what_takes_the_verdict_is_said(made: Any, halving: dict[str, Any], grid: dict[str, Any], note: str) -> None:
    the_plan = made({"grace_steps": 2} | halving, grid)
    assert early_stopping_notes(the_plan) == [note]
    printed = io.StringIO()
    Console(width=400, file=printed).print(render_plan(the_plan))
    assert f"note: {note}\n" in "".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines())


def test_a_method_in_several_queues_is_said(made: Any) -> None:
    planned, _ = plan_on(made({"grace_steps": 2, "reduction_factor": 2}), Node(num_cpus=12, num_gpus=3))
    assert early_stopping_notes(planned) == [
        "lora is divided over 2 queues, which rank their own settings: at least 2 settings reach the last step"
    ]
    assert early_stopping_notes(replace(planned, packs=made({"grace_steps": 2}).packs)) == []
