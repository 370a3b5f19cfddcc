"""The table of sample answers holds the chosen trials' texts, and MLflow shows it with the sweep's run."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from loragrid.comparison.sample_answers import SAMPLES_TABLE, Answer, as_mlflow_table, load_samples
from loragrid.comparison.selection import choose
from loragrid.comparison.table import Comparison, load_comparison
from loragrid.sweep.summary import SweepCost, record_summary
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import default_tracking_uri
from loragrid.trials.tags import SAMPLES_PROBLEM_TAG

HOSTILE = '<script>alert("x")</script> | `a` \x1b[2J\u202e __init__ 12345678901234567890'
SYSTEM = "system\nBe kind\nuser\n"


def answers_of(trial_id: str, rows: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """What a trial records; its second answer is cut off."""
    return {
        "split": "test",
        "decoding": "greedy, at most 9 new tokens",
        "prompts": [
            {
                "row": f"{row:016x}",
                "prompt": f"{SYSTEM}Question {row}\nassistant\n",
                "reference": f"reference {row}",
                "base": {"text": f"base {row}", "is_complete": True},
                "answer": {"text": f"{trial_id} says {row} {HOSTILE}", "is_complete": row != 2},
            }
            for row in rows
        ],
    }


def record_trial(
    recorder: Recorder, method: str, lr: float, seed: int, loss: float, content: object, problem: str = ""
) -> None:
    """One finished trial with these sample answers; None: it has none."""
    trial_id = f"{method}-{lr:g}-{seed}"
    tags = {SAMPLES_PROBLEM_TAG: problem} if problem else {}
    recorder.start_trial(trial_id, {"method.name": method, "training.lr": lr, "seed": seed}, tags)
    recorder.log_summary(trial_id, {"eval/final_loss": loss, "parameters/trainable": 5})
    if content is not None:
        with tempfile.TemporaryDirectory() as name:
            text = content if isinstance(content, str) else json.dumps(content)
            (Path(name) / "answers.json").write_text(text, encoding="utf-8")
            recorder.log_artifacts(trial_id, Path(name), "samples")
    recorder.end_trial(trial_id, "FINISHED")


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    recorder = Recorder("said", default_tracking_uri(str(tmp_path_factory.mktemp("store")), None))
    recorder.start_sweep("said-1", {}, {})
    for seed in (4, 3):
        for lr, loss in ((1e-3, 2.0), (1e-2, 1.0)):
            trial_id = f"lora-{lr:g}-{seed}"
            record_trial(recorder, "lora", lr, seed, loss + seed / 100, answers_of(trial_id))
        # The lowest seed's answers are missing, as of a trial that an older version finished.
        record_trial(recorder, "base", 1e-3, seed, 1.5, answers_of("base", (2, 3)) if seed == 4 else None)
        record_trial(recorder, "vera", 1e-3, seed, 1.7, None, problem="it has no cache")
    assert recorder.deliver()
    return recorder


@pytest.fixture(scope="module")
def comparison(recorder: Recorder) -> Comparison:
    return load_comparison("said", recorder.tracking_uri)


def test_each_methods_best_setting_answers_with_its_lowest_seed(comparison: Comparison) -> None:
    samples = load_samples(comparison, choose(comparison).choices)
    assert samples is not None
    assert samples.trial_ids == {"lora": "lora-0.01-3", "base": "base-0.001-4"}
    assert samples.problems == {"vera": "it has no cache"}
    assert (samples.split, samples.decoding) == ("test", "greedy, at most 9 new tokens")
    first, second, third = samples.rows
    assert first.answers == {"lora": Answer(text=f"lora-0.01-3 says 1 {HOSTILE}")}
    assert first.reference == "reference 1"
    assert first.base == Answer(text="base 1")
    assert second.answers.keys() == {"lora", "base"}
    assert str(second.answers["lora"]) == f"lora-0.01-3 says 2 {HOSTILE} …"
    assert third.answers.keys() == {"base"}


def test_lines_that_all_prompts_share_are_left_out(comparison: Comparison) -> None:
    samples = load_samples(comparison, choose(comparison).choices)
    assert samples is not None
    assert [row.prompt for row in samples.rows] == ["Question 1", "Question 2", "Question 3"]


def test_mlflow_reads_the_table_from_the_sweeps_run(
    recorder: Recorder, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # a resumed sweep records it again
        record_summary(recorder, "said-1", SweepCost())
        assert recorder.deliver()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", recorder.tracking_uri)  # `load_table` searches there
    client = MlflowClient(tracking_uri=recorder.tracking_uri)
    table = client.load_table(recorder.experiment_id, SAMPLES_TABLE, [comparison.sweep_run_id])
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == ["prompt", "reference", "base", "lora", "method base"]
    assert table["prompt"].tolist() == ["Question 1", "Question 2", "Question 3"]
    assert table["lora"][0] == f"lora-0.01-3 says 1 {HOSTILE}"
    assert table["method base"].isna().tolist() == [True, False, False]


def test_mlflows_own_function_would_record_the_same(recorder: Recorder, tmp_path: Path) -> None:
    columns: list[str] = ["prompt", "base"]
    rows: list[list[str | None]] = [["a", None], ["b\n", HOSTILE]]
    recorder.log_sweep_table("ours.json", columns, rows)
    assert recorder.deliver()
    client = MlflowClient(tracking_uri=recorder.tracking_uri)
    other = client.create_run(recorder.experiment_id).info.run_id
    client.log_table(other, pd.DataFrame(rows, columns=columns), "ours.json")
    kept = []
    for run_id in (recorder.sweep_run_id, other):
        (tmp_path / run_id).mkdir()
        path = client.download_artifacts(run_id, "ours.json", str(tmp_path / run_id))
        tag = client.get_run(run_id).data.tags["mlflow.loggedArtifacts"]
        kept.append((json.loads(Path(path).read_text(encoding="utf-8")), json.loads(tag)))
    assert kept[0] == kept[1]


def test_several_tasks_share_one_table(comparison: Comparison) -> None:
    samples = load_samples(comparison, choose(comparison).choices)
    assert samples is not None
    columns, rows = as_mlflow_table({"data a": samples, "data b": samples})
    assert columns[:2] == ["task", "prompt"]
    assert [row[0] for row in rows] == ["data a"] * 3 + ["data b"] * 3


def test_a_sweep_without_answers_has_no_table(recorder: Recorder) -> None:
    old = Recorder("old", recorder.tracking_uri)
    old.start_sweep("old-1", {}, {})
    record_trial(old, "lora", 1e-3, 0, 1.0, None)
    record_summary(old, "old-1", SweepCost())
    old.end_sweep("FINISHED")
    comparison = load_comparison("old", old.tracking_uri)
    assert load_samples(comparison, choose(comparison).choices) is None
    client = MlflowClient(tracking_uri=old.tracking_uri)
    assert SAMPLES_TABLE not in {file.path for file in client.list_artifacts(comparison.sweep_run_id)}


def test_a_damaged_artifact_is_named_in_the_error(recorder: Recorder) -> None:
    damaged = Recorder("damaged", recorder.tracking_uri)
    damaged.start_sweep("damaged-1", {}, {})
    for method, content in {"lora": "{", "vera": '{"prompts": [{"row": 1}]}', "dora": "[]"}.items():
        record_trial(damaged, method, 1e-3, 0, 1.0, content)
    damaged.end_sweep("FINISHED")
    comparison = load_comparison("damaged", damaged.tracking_uri)
    for choice in choose(comparison).choices:
        message = rf"{choice.name}-0\.001-0: its artifact samples/answers\.json is not as LoraGrid"
        with pytest.raises(ValueError, match=message):
            load_samples(comparison, [choice])
