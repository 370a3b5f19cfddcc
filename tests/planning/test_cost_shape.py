"""Trials have one shape if they cost the same; learning rates, seeds and the number of steps cost nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loragrid.planning.timing import cost_shape
from tests.support.small_packs import Setup, make_setup


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


@pytest.mark.parametrize(
    ("name", "fields", "training"),
    [
        ("lora_plus", {}, {}),
        ("lora_plus", {"lr_ratio": 4.0}, {}),
        ("lora", {"alpha": 3.0}, {}),
        ("lora", {}, {"lr": 0.5, "steps": 99, "weight_decay": 0.1, "clip_norm": None}),
        ("lora", {}, {"measure_steps": 9, "eval_every": 2}),
    ],
)
def test_trials_that_cost_the_same_have_one_shape(
    setup: Setup, name: str, fields: dict[str, Any], training: dict[str, Any]
) -> None:
    assert cost_shape(setup.trial(name, fields, seed=7, **training)) == cost_shape(setup.trial("lora"))


@pytest.mark.parametrize(
    ("name", "fields", "training"),
    [
        ("lora", {"rank": 4}, {}),
        ("lora", {"dropout": 0.1}, {}),
        ("lora", {"target_modules": ("c_attn",)}, {}),
        ("lora_fa", {}, {}),
        ("dora", {}, {}),
        ("lora", {}, {"batch_size": 8}),
        ("lora", {}, {"micro_batch_size": 2}),
        ("lora", {}, {"activation_checkpointing": True}),
    ],
)
def test_trials_that_cost_differently_have_different_shapes(
    setup: Setup, name: str, fields: dict[str, Any], training: dict[str, Any]
) -> None:
    assert cost_shape(setup.trial(name, fields, **training)) != cost_shape(setup.trial("lora"))


def test_longer_rows_and_another_base_are_other_shapes(setup: Setup) -> None:
    trial = setup.trial("lora")
    longer = replace(trial, data=trial.data.model_copy(update={"max_length": 48}))
    wider = replace(trial, model=trial.model.model_copy(update={"dtype": "float32"}))
    assert len({cost_shape(one) for one in (trial, longer, wider)}) == 3


def test_ranks_of_one_stack_are_different_shapes(setup: Setup) -> None:
    """Ranks 3 and 4 share stacks in a pack, where the smaller is padded; in packs of one they cost differently."""
    trials = [setup.trial("delta_lora", {"rank": rank}) for rank in (3, 4)]
    assert trials[0].method.stack_key() == trials[1].method.stack_key()
    assert cost_shape(trials[0]) != cost_shape(trials[1])
