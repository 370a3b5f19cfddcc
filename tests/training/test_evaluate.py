"""If memory is short, scoring uses less of it and returns the same scores; a task's rows are read only once."""

import csv
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loragrid.training.evaluate
import loragrid.worker.pack_inputs
import loragrid.worker.resident_base
from loragrid.evaluation.task_scorer import TaskScorer, task_scorer
from loragrid.models.loading import load_base
from loragrid.tasks.contract import TaskConfig
from loragrid.tasks.kinds.exact_match import ExactMatch
from loragrid.tasks.kinds.label_likelihood import LabelLikelihood
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.batches import PackBatches
from loragrid.training.evaluate import evaluate, score_row_by_row
from loragrid.training.step import PackModel, one_worker
from loragrid.trials.trial import Trial
from tests.support.queue_runs import Seen, queue
from tests.support.small_packs import Setup, make_setup

NUM_TEST = 7
ROWS = 8
TASKS = {
    "no task": None,
    "generation": ExactMatch(answer_pattern="(#+)", max_new_tokens=5),
    "sampling": ExactMatch(answer_pattern="(#+)", max_new_tokens=5, temperature=0.8),
    "labels": LabelLikelihood(),
}


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("rows")
    rows, text = folder / "rows.jsonl", folder / "plain.txt"
    answers = ("7", "1,250", "-33")
    lines = [{"prompt": f"What makes {n}?", "completion": f" It is #### {answers[n % 3]}"} for n in range(60)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text.write_text("The old bridge stands near the market, and nobody knows who built it. " * 20, encoding="utf-8")
    return make_setup(tiny_gpt2_dir, rows, "float64", num_test=NUM_TEST, forgetting_name=str(text), num_forgetting=6)


@pytest.fixture(autouse=True)
def stores_that_pytest_cleans_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def trials_of(setup: Setup, task: TaskConfig | None) -> list[Trial]:
    names = {"lora": {"dropout": 0.2}, "vera": {}, "delta_lora": {}}
    trials = [setup.trial(name, fields, steps=3, batch_size=ROWS, measure_steps=0) for name, fields in names.items()]
    return [replace(trial, task=task) for trial in trials]


def short_of_memory(base: nn.Module, most_rows: int) -> list[int]:
    """From now on the base has memory for so many rows at once where nothing is trained; the list: how many it got."""
    seen: list[int] = []

    def allocate(embeddings: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if not torch.is_grad_enabled():
            seen.append(len(arguments[0]))
            if seen[-1] > most_rows:
                raise torch.OutOfMemoryError(f"no room for {seen[-1]} rows")

    base.get_submodule("transformer.wte").register_forward_pre_hook(allocate)
    return seen


def queue_with_room_for(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, task: TaskConfig | None, most_rows: int
) -> tuple[Seen, list[int]]:
    seen: list[list[int]] = []

    def load(*arguments: Any) -> Any:
        base = load_base(*arguments)
        seen.append(short_of_memory(base, most_rows))
        return base

    monkeypatch.setattr(loragrid.worker.resident_base, "load_base", load)
    found = queue(setup, [trials_of(setup, task)])
    (rows,) = seen
    return found, rows


def scores(seen: Seen, trial: Trial) -> list[dict[str, str]]:
    with (Path(seen.store.uri) / trial.trial_id / "scores" / "test.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_a_pack_short_of_memory_is_scored_in_smaller_chunks(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, task: TaskConfig | None
) -> None:
    """Eight rows at once are too many, and so are four of each of three members; two of each are not."""
    ours, rows = queue_with_room_for(setup, monkeypatch, task, 3 * 2 + 1)
    monkeypatch.undo()
    undisturbed = queue(setup, [trials_of(setup, task)])
    # Of the bare base, before anything is trained; then of all three members, after all three steps.
    assert [number for number in rows if number > 3 * 2 + 1] == [8, 3 * 4]
    for trial in trials_of(setup, task):
        assert ours.ended[trial.trial_id].status == "FINISHED"
        assert ours.tags(trial)["loragrid.scoring.rows_at_once"] == "2"
        assert ours.tags(trial)["loragrid.scoring.rows_at_once.reason"] == "out_of_memory: no room for 12 rows"
        assert "loragrid.pack.split" not in ours.tags(trial)
        assert "loragrid.scoring.rows_at_once" not in undisturbed.tags(trial)
        expected = undisturbed.records(trial)
        assert ours.records(trial).keys() == expected.keys()
        for step, record in ours.records(trial).items():
            assert record == pytest.approx(expected[step], rel=1e-12, abs=1e-12)
        assert ours.figures[trial.trial_id] == pytest.approx(undisturbed.figures[trial.trial_id], rel=1e-12)
        for row, other in zip(scores(ours, trial), scores(undisturbed, trial), strict=True):
            assert float(row.pop("loss")) == pytest.approx(float(other.pop("loss")), rel=1e-12)
            assert row == other
    assert len(scores(ours, trial)) == NUM_TEST


@pytest.mark.parametrize("task", [None, TASKS["generation"]], ids=["no task", "generation"])
def test_a_pack_is_halved_if_no_row_fits(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, task: TaskConfig | None
) -> None:
    ours, _ = queue_with_room_for(setup, monkeypatch, task, 2)
    for trial in trials_of(setup, task):
        assert ours.ended[trial.trial_id].status == "FINISHED"
        assert "was halved: out_of_memory: no room for 3 rows" in ours.tags(trial)["loragrid.pack.split"]


def test_a_single_row_that_does_not_fit_fails_the_trial(setup: Setup) -> None:
    trials = trials_of(setup, None)[:1]
    batches = build_batches(trials, setup.rows, torch.device("cpu"))
    model = build_model(trials, setup.base())
    seen = short_of_memory(model.base, 0)
    with pytest.raises(torch.OutOfMemoryError, match="no room for 1 rows"):
        evaluate(model, batches, one_worker)
    assert seen == [8, 4, 2, 1]


def test_what_is_no_want_of_memory_is_not_tried_again(setup: Setup) -> None:
    trials = trials_of(setup, None)[:1]
    batches = build_batches(trials, setup.rows, torch.device("cpu"))
    model = build_model(trials, setup.base())
    calls: list[None] = []

    def fail(*_: object) -> None:
        calls.append(None)
        raise RuntimeError("another reason")

    model.base.get_submodule("transformer").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="another reason"):
        evaluate(model, batches, one_worker)
    assert len(calls) == 1
    assert batches.scoring.size == ROWS


@pytest.mark.parametrize("most_rows", [2, 1])
def test_workers_halve_their_scoring_chunks_independently(setup: Setup, most_rows: int) -> None:
    trials, device = trials_of(setup, None)[:1], torch.device("cpu")
    scorer = task_scorer(ExactMatch(max_new_tokens=5), setup.model, setup.rows)
    sums: list[torch.Size] = []
    ample, short = (build_model(trials, setup.base()) for _ in range(2))
    seen = short_of_memory(short.base, most_rows)
    scorings: list[Callable[[PackModel, PackBatches], torch.Tensor]] = [
        lambda model, batches: evaluate(model, batches, one_worker),
        lambda model, batches: score_row_by_row(model, batches, setup.rows.test, one_worker),
        lambda model, batches: scorer.score(model, batches, "test", lambda tensor: sums.append(tensor.shape))[
            "correct"
        ],
    ]
    for score in scorings:
        alone = score(ample, build_batches(trials, setup.rows, device))
        first, second = (build_batches(trials, setup.rows, device, worker=number, num_workers=2) for number in (0, 1))
        seen.clear()
        together = score(ample, first) + score(short, second)
        assert first.scoring.size == 4
        assert seen[0] == (3 if score is scorings[2] else 4), "prompts stand without rows that fill the batch"
        assert second.scoring.size == most_rows
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert sums == [(1, 1, NUM_TEST)] * 3, "nothing is agreed on the way"


def test_workers_that_share_a_base_do_not_go_different_ways(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_of(setup, None)[:1]
    batches = build_batches(trials, setup.rows, torch.device("cpu"), worker=1, num_workers=2)
    monkeypatch.setattr(loragrid.training.evaluate, "is_sharded", lambda base: True)
    model = build_model(trials, setup.base())
    seen = short_of_memory(model.base, 2)
    scorings: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: evaluate(model, batches, one_worker),
        lambda: score_row_by_row(model, batches, setup.rows.test, one_worker),
    )
    for score in scorings:
        seen.clear()
        with pytest.raises(torch.OutOfMemoryError, match="no room for 4 rows"):
            score()
        assert seen == [4]


def test_chunks_stay_smaller_after_memory_ran_out_once(setup: Setup) -> None:
    trials = trials_of(setup, None)[:2]
    batches = build_batches(trials, setup.rows, torch.device("cpu"))
    model = build_model(trials, setup.base())
    whole = evaluate(model, batches, one_worker)
    seen = short_of_memory(model.base, 8)
    halved = evaluate(model, batches, one_worker)
    assert seen == [16, 8, 8, 8]  # ten evaluation rows, four of each member at once
    assert torch.allclose(halved, whole, rtol=1e-13, atol=0)
    seen.clear()
    evaluate(model, batches, one_worker)
    assert set(seen) == {8}


def test_packs_with_a_common_task_share_its_scorer(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def counted(task: TaskConfig, *arguments: Any) -> TaskScorer:
        made.append(task)
        return task_scorer(task, *arguments)

    monkeypatch.setattr(loragrid.worker.pack_inputs, "task_scorer", counted)
    tasks = (TASKS["labels"], TASKS["generation"], TASKS["labels"])
    packs = [[replace(t, trial_id=f"{t.trial_id}-{i}") for t in trials_of(setup, task)] for i, task in enumerate(tasks)]
    seen = queue(setup, packs)
    assert {end.status for end in seen.ended.values()} == {"FINISHED"}
    assert made == [TASKS["labels"], TASKS["generation"]]
    for first, last in zip(packs[0], packs[2], strict=True):
        assert scores(seen, first) == scores(seen, last)


def test_only_the_chunks_of_prompts_become_smaller(setup: Setup) -> None:
    trials, device = trials_of(setup, None)[:2], torch.device("cpu")
    scorer = task_scorer(ExactMatch(max_new_tokens=5), setup.model, setup.rows)
    model = build_model(trials, setup.base())
    expected = scorer.score(model, build_batches(trials, setup.rows, device), "test", one_worker)["correct"]
    seen = short_of_memory(model.base, 2 * NUM_TEST)
    batches = build_batches(trials, setup.rows, device, prompts_at_once=50)
    assert torch.equal(scorer.score(model, batches, "test", one_worker)["correct"], expected)
    assert seen == [2 * NUM_TEST] * 5, "no prompt is answered that was not asked"
    assert not batches.tags
    seen.clear()
    shorter = short_of_memory(model.base, 2 * NUM_TEST - 1)
    batches = build_batches(trials, setup.rows, device, prompts_at_once=10)
    assert torch.equal(scorer.score(model, batches, "test", one_worker)["correct"], expected)
    assert shorter[0] == 2 * NUM_TEST
    assert (batches.answering.size, batches.scoring.size) == (5, ROWS)
    assert batches.tags == {
        "loragrid.scoring.prompts_at_once": "5",
        "loragrid.scoring.prompts_at_once.reason": f"out_of_memory: no room for {2 * NUM_TEST} rows",
    }


def test_two_workers_with_larger_prompt_chunks_agree_with_one(setup: Setup) -> None:
    trials, device = trials_of(setup, None)[:2], torch.device("cpu")
    scorer = task_scorer(ExactMatch(max_new_tokens=5), setup.model, setup.rows)
    model = build_model(trials, setup.base())
    expected = scorer.score(model, build_batches(trials, setup.rows, device), "test", one_worker)["correct"]
    for prompts in (5, 6, 50):
        shares = [
            build_batches(trials, setup.rows, device, worker=worker, num_workers=2, prompts_at_once=prompts)
            for worker in range(2)
        ]
        found = [scorer.score(model, share, "test", one_worker)["correct"] for share in shares]
        assert torch.equal(found[0] + found[1], expected), prompts
