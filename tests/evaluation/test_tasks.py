"""Accuracy and forgetting equal those of each member's model by itself, and are recorded at the configured steps."""

import csv
import itertools
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from loragrid.config.experiment import DataConfig, EarlyStoppingConfig, ModelConfig
from loragrid.data.dataset import load_data
from loragrid.evaluation.task_scorer import TaskScorer, task_scorer
from loragrid.models.loading import load_tokenizer, max_context
from loragrid.tasks.contract import TaskConfig
from loragrid.tasks.discovery import read_task
from loragrid.tasks.kinds.label_likelihood import LabelLikelihood
from loragrid.training.assembly import build_batches
from loragrid.training.step import one_worker
from loragrid.trials.trial import Trial
from loragrid.worker.export import export_member, merge_adapter
from tests.support.queue_runs import Seen, queue
from tests.support.small_packs import Run, Setup, largest_difference, make_setup, run_pack
from tests.support.sums_task import EXACT, NUM_EVAL, NUM_TEST, STEPS, sums

LIKELY = LabelLikelihood()


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("sums")
    rows, text = folder / "sums.jsonl", folder / "plain.txt"
    rows.write_text("".join(json.dumps(row) + "\n" for row in sums()), encoding="utf-8")
    text.write_text("The old bridge stands near the market, and nobody knows who built it. " * 6, encoding="utf-8")
    return make_setup(tiny_gpt2_dir, rows, "float64", num_test=NUM_TEST, forgetting_name=str(text), num_forgetting=3)


@pytest.fixture(autouse=True)
def stores_that_pytest_cleans_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def trials_of(setup: Setup, task: TaskConfig | None, **training: Any) -> list[Trial]:
    """Members that learn well, badly, and not at all."""
    settings = {"steps": STEPS, "measure_steps": 0} | training
    trials = [
        setup.trial("lora", {"rank": 16}, lr=0.02, batch_size=8, **settings),
        setup.trial("lora", {"rank": 4}, lr=0.005, batch_size=8, seed=1, **settings),
        setup.trial("frozen", batch_size=8, **settings),
        setup.trial("vera", {"rank": 16}, lr=0.3, batch_size=8, **settings),
    ]
    return [replace(trial, task=task, trial_id=f"{trial.trial_id}-{task is None}") for trial in trials]


@pytest.fixture(scope="module")
def trained(setup: Setup) -> Run:
    return run_pack(setup, trials_of(setup, None))


def scorer_of(setup: Setup, task: TaskConfig) -> TaskScorer:
    return TaskScorer(task, load_tokenizer(setup.model), setup.rows, max_context(setup.model))


def alone(run: Run, member: int, setup: Setup, folder: Path) -> PreTrainedModel:
    base = setup.base()
    if export_member(run.model, member, "base", folder / str(member)):
        merge_adapter(base, folder / str(member), type(run.model.pack.methods[member]))
    return base


def texts(setup: Setup, split: str) -> list[tuple[list[int], str]]:
    """(prompt tokens, completion) of a split's rows, read off the text."""
    tokenizer = load_tokenizer(setup.model)
    rows = getattr(setup.rows, split)
    found = []
    for ids, length in zip(rows.input_ids, rows.num_tokens.tolist(), strict=True):
        prompt, completion = str(tokenizer.decode(ids[:length])).split("?")
        found.append((list(tokenizer(f"{prompt}?")["input_ids"]), completion.removesuffix("<|end|>")))
    return found


def answers_of_transformers(base: Any, setup: Setup, split: str) -> list[int]:
    tokenizer = load_tokenizer(setup.model)
    right = []
    for prompt, completion in texts(setup, split):
        ids = torch.tensor([prompt])
        found = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[0, len(prompt) :]
        said = str(tokenizer.decode(found, skip_special_tokens=True))
        right.append(int(re.findall("#+", said)[-1:] == re.findall("#+", completion)[-1:]))
    return right


def likeliest_by_logits(base: PreTrainedModel, setup: Setup, split: str, *, per_token: bool) -> list[int]:
    tokenizer = load_tokenizer(setup.model)
    labels = sorted({row["completion"] for row in sums()})
    right = []
    for prompt, completion in texts(setup, split):
        scores = []
        for label in labels:
            answer = [*tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = base(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            score = -F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            scores.append(score / len(answer) if per_token else score)
        right.append(int(labels[scores.index(max(scores))] == completion))
    return right


@pytest.mark.parametrize("split", ["eval", "test"])
def test_right_answers_equal_transformers_on_the_merged_model(
    setup: Setup, trained: Run, tmp_path: Path, split: str
) -> None:
    batches = build_batches(trials_of(setup, None), setup.rows, trained.model.base.device)
    right = scorer_of(setup, EXACT).score(trained.model, batches, split, one_worker)["correct"]
    name = {"eval": "evaluation", "test": "test"}[split]
    for member in range(len(right)):
        model = alone(trained, member, setup, tmp_path)
        assert right[member].tolist() == answers_of_transformers(model, setup, name), member
    assert 0 < right.mean() < 1
    assert right[2].sum() == 0
    assert right[0].sum() > 0


@pytest.mark.parametrize("split", ["eval", "test"])
@pytest.mark.parametrize("likelihood", ["summed", "per_token"])
def test_the_likeliest_label_follows_from_the_logits(
    setup: Setup, trained: Run, tmp_path: Path, split: str, likelihood: str
) -> None:
    batches = build_batches(trials_of(setup, None), setup.rows, trained.model.base.device)
    task = read_task({"kind": "label_likelihood", "likelihood": likelihood})
    right = scorer_of(setup, task).score(trained.model, batches, split, one_worker)["correct"]
    name = {"eval": "evaluation", "test": "test"}[split]
    for member in range(len(right)):
        model = alone(trained, member, setup, tmp_path)
        expected = likeliest_by_logits(model, setup, name, per_token=likelihood == "per_token")
        assert right[member].tolist() == expected, member
    assert 0 < right.mean() < 1


@pytest.mark.parametrize("task", [EXACT, LIKELY], ids=["exact_match", "label_likelihood"])
def test_the_bare_base_is_scored_under_any_pack(setup: Setup, trained: Run, task: TaskConfig) -> None:
    batches = build_batches(trials_of(setup, None), setup.rows, trained.model.base.device)
    scorer = scorer_of(setup, task)
    bare = scorer.score(trained.model, batches, "eval", one_worker, frozen=True)["correct"]
    all_members = scorer.score(trained.model, batches, "eval", one_worker)["correct"]
    assert bare.shape == (1, NUM_EVAL)
    assert torch.equal(bare[0], all_members[2])  # the frozen member's


@pytest.mark.parametrize("task", [EXACT, LIKELY], ids=["exact_match", "label_likelihood"])
def test_workers_and_micro_batches_find_the_same_scores(setup: Setup, trained: Run, task: TaskConfig) -> None:
    trials, device = trials_of(setup, None), trained.model.base.device
    scorer = scorer_of(setup, task)
    one = scorer.score(trained.model, build_batches(trials, setup.rows, device), "test", one_worker)["correct"]
    shares = []
    for worker in range(2):
        batches = build_batches(trials, setup.rows, device, worker=worker, num_workers=2)
        shares.append(_correct_before_the_sum(scorer, trained, batches, task))
    assert torch.equal(_decide(scorer, shares, task, setup), one)
    small = [replace(t, training=t.training.model_copy(update={"micro_batch_size": 1})) for t in trials]
    assert torch.equal(
        scorer.score(trained.model, build_batches(small, setup.rows, device), "test", one_worker)["correct"], one
    )


def _correct_before_the_sum(scorer: TaskScorer, run: Run, batches: Any, task: TaskConfig) -> torch.Tensor:
    """What one of two workers has to add: right answers, or the losses of its rows with every label."""
    given: list[torch.Tensor] = []
    found = scorer.score(run.model, batches, "test", lambda tensor: given.append(tensor.clone()))["correct"]
    return found if task.kind == "exact_match" else given[-1]


def _decide(scorer: TaskScorer, shares: Sequence[torch.Tensor], task: TaskConfig, setup: Setup) -> torch.Tensor:
    total = shares[0] + shares[1]
    if task.kind == "exact_match":
        return total
    labels = sorted({row["completion"].strip() for row in sums()})
    own = torch.tensor([labels.index(completion.strip()) for _, completion in texts(setup, "test")])
    right: torch.Tensor = (total.unflatten(1, (NUM_TEST, len(labels))).argmin(-1) == own).double()
    return right


@pytest.mark.heavy
def test_figures_are_measured_at_both_ends_and_every_so_often(setup: Setup) -> None:
    for fields, expected in (
        ({}, {0, STEPS}),
        ({"base": False}, {STEPS}),
        ({"every": 25}, {0, 25, 50, STEPS}),
    ):
        trials = trials_of(setup, EXACT.model_copy(update=fields))
        seen = queue(setup, [trials])
        for trial in trials:
            records = seen.records(trial)
            assert {step for step, record in records.items() if "eval/accuracy" in record} == expected
            assert 0 <= records[STEPS]["eval/accuracy"] <= 1


def read_scores(seen: Seen, trial: Trial) -> list[dict[str, str]]:
    with (Path(seen.store.uri) / trial.trial_id / "scores" / "test.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", [EXACT, LIKELY], ids=["exact_match", "label_likelihood"])
def test_the_record_holds_figures_row_scores_decoding_and_time(setup: Setup, trained: Run, task: TaskConfig) -> None:
    trials = trials_of(setup, task)
    seen = queue(setup, [trials])
    assert {end.status for end in seen.ended.values()} == {"FINISHED"}
    scorer = task_scorer(task, setup.model, setup.rows)
    batches = build_batches(trials, setup.rows, trained.model.base.device)
    for split, right in {
        split: scorer.score(trained.model, batches, split, one_worker)["correct"] for split in ("eval", "test")
    }.items():
        for trial, own in zip(trials, right.tolist(), strict=True):
            accuracy = sum(own) / len(own)
            if split == "eval":
                assert seen.records(trial)[STEPS]["eval/accuracy"] == pytest.approx(accuracy)
            else:
                rows = read_scores(seen, trial)
                assert [int(row["correct"]) for row in rows] == own
                assert [row["row"] for row in rows] == setup.rows.test.digests()
                assert seen.figures[trial.trial_id]["test/accuracy"] == pytest.approx(accuracy)
    for trial in trials:
        assert seen.tags(trial)["loragrid.decoding"].startswith(task.decoding)
        assert seen.ended[trial.trial_id].seconds["generate"] > 0


@pytest.mark.heavy
def test_a_task_changes_no_training_step(setup: Setup) -> None:
    with_task, without = trials_of(setup, EXACT), trials_of(setup, None)
    seen, plain = queue(setup, [with_task]), queue(setup, [without])
    for ours, theirs in zip(with_task, without, strict=True):
        for key in ("train/loss", "train/grad_norm"):
            curves = [
                {step: record[key] for step, record in records.items() if key in record}
                for records in (seen.records(ours), plain.records(theirs))
            ]
            assert largest_difference(*curves) == 0.0
        assert "correct" not in read_scores(plain, theirs)[0]
        assert "loragrid.decoding" not in plain.tags(theirs)
        assert "generate" not in plain.ended[theirs.trial_id].seconds


def test_trials_stopped_at_a_rung_answer_nothing(setup: Setup) -> None:
    trials = trials_of(setup, EXACT)
    seen = queue(setup, [trials], EarlyStoppingConfig(grace_steps=6, reduction_factor=4, within="sweep"))
    stopped = [trial for trial in trials if seen.ended[trial.trial_id].status == "KILLED"]
    assert len(stopped) == 3
    for trial in trials:
        looked = {step for step, record in seen.records(trial).items() if "eval/accuracy" in record}
        assert looked == ({0} if trial in stopped else {0, STEPS})


def test_held_out_text_loss_equals_each_models_own_loss(setup: Setup, trained: Run, tmp_path: Path) -> None:
    trials = trials_of(setup, None)
    seen = queue(setup, [trials])
    pieces = setup.rows.held_out_text
    assert pieces is not None
    assert len(pieces) == 3

    def loss_of_text(base: PreTrainedModel) -> float:
        with torch.no_grad():
            logits = base(input_ids=pieces.input_ids).logits
        losses = [
            F.cross_entropy(row[: n - 1], ids[1:n], reduction="sum")
            for row, ids, n in zip(logits, pieces.input_ids, pieces.num_tokens.tolist(), strict=True)
        ]
        return float(sum(losses)) / int((pieces.num_tokens - 1).sum())

    base_loss = loss_of_text(setup.base())
    for member, trial in enumerate(trials):
        records = seen.records(trial)
        assert records[0]["forgetting/base_loss"] == pytest.approx(base_loss, rel=1e-10)
        after = loss_of_text(alone(trained, member, setup, tmp_path))
        assert records[STEPS]["forgetting/loss"] == pytest.approx(after, rel=1e-10)
        assert [step for step, record in records.items() if "forgetting/loss" in record] == [0, STEPS]
        assert records[0]["forgetting/loss"] == records[0]["forgetting/base_loss"]
    assert records[STEPS]["forgetting/loss"] != pytest.approx(base_loss)
    assert seen.records(trials[2])[STEPS]["forgetting/loss"] == pytest.approx(base_loss, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "early_stopping", "expected"),
    [
        ({"eval_every": 20}, None, {0, 20, 40, STEPS}),
        ({"eval_every": 20, "forgetting_every": 40}, None, {0, 40, STEPS}),
        ({}, EarlyStoppingConfig(grace_steps=30, reduction_factor=2), {0, 30, STEPS}),
    ],
)
@pytest.mark.heavy
def test_held_out_text_is_measured_along_the_path(
    setup: Setup, keys: dict[str, int], early_stopping: EarlyStoppingConfig | None, expected: set[int]
) -> None:
    trials = trials_of(setup, None, **keys)
    seen = queue(setup, [trials], early_stopping)
    for trial in trials:
        records, is_whole = seen.records(trial), seen.ended[trial.trial_id].status == "FINISHED"
        measured = {step for step, record in records.items() if "forgetting/loss" in record}
        assert measured == (expected if is_whole else expected - {STEPS})
        assert measured <= {step for step, record in records.items() if "eval/loss" in record}


def test_held_out_text_is_cut_without_overlap_from_any_format(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    model = ModelConfig(name=str(tiny_gpt2_dir))
    tokenizer = load_tokenizer(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in sums()), encoding="utf-8")

    def pieces_of(name: str, content: str, **keys: Any) -> list[list[int]]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        data = DataConfig.model_validate(
            {"name": str(rows), "max_length": 40, "num_eval": 4, "forgetting_name": str(tmp_path / name)} | keys
        )
        found = load_data(data, model, tokenizer).held_out_text
        assert found is not None
        return [ids[:n].tolist() for ids, n in zip(found.input_ids, found.num_tokens.tolist(), strict=True)]

    text = "A line about the garden.\n" * 9
    tokens = tokenizer(text)["input_ids"]
    assert list(itertools.chain(*pieces_of("a.txt", text))) == tokens
    assert {len(piece) for piece in pieces_of("a.txt", text)[:-1]} == {40}
    assert pieces_of("a.txt", text, num_forgetting=2) == pieces_of("a.txt", text)[:2]
    assert pieces_of("a.jsonl", json.dumps({"text": text})) == pieces_of("a.txt", text)
    for name, content, keys, message in (
        ("a.txt", text, {"num_forgetting": 99}, r"data\.num_forgetting: 99: .*a\.txt has only"),
        ("b.txt", "", {}, r"data\.forgetting_name: .*b\.txt: holds no two tokens"),
        ("b.jsonl", json.dumps({"body": text}), {}, r"data\.forgetting_name: .*has no column text"),
        ("b.bin", "x", {}, r"data\.forgetting_name: .*not a local \.txt, \.jsonl, \.json, \.csv or \.parquet file"),
    ):
        with pytest.raises(ValueError, match=message):
            pieces_of(name, content, **keys)
    with pytest.raises(ValueError, match=r"data\.forgetting_name: .*no such file|No such file"):
        load_data(
            DataConfig(name=str(rows), num_eval=4, max_length=40, forgetting_name=str(tmp_path / "c.txt")),
            model,
            tokenizer,
        )
    with pytest.raises(ValueError, match=r"num_forgetting.*forgetting_name set"):
        DataConfig(name="x", num_forgetting=3)
