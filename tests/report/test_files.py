"""Report files: Markdown, CSV and JSON contain the verdict's figures, and PEFT's app can load the result files."""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient

import loragrid as lg
from loragrid.comparison.experiment_file import experiment_to_yaml, rebuild_experiment
from loragrid.comparison.sweep_record import load_record
from loragrid.comparison.table import Comparison, load_comparison
from loragrid.comparison.verdict import load_verdict
from loragrid.report.files import format_of, keep_report, leave_report, write_report
from loragrid.report.peft_results import write_peft_results
from loragrid.sweep.record import sweep_parameters
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import default_tracking_uri, format_parameter
from loragrid.trials.load import experiment_from_mapping, load_experiment
from loragrid.trials.tags import LABEL_TAG, QUESTION_TAG
from tests.support.recorded_sweeps import LADDERS, MadeUpTrial, record_trial, record_word_problems

EXPERIMENTS = sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.yaml"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two methods × three learning rates × two seeds."""
    uri = default_tracking_uri(str(tmp_path_factory.mktemp("small")), None)
    recorder = Recorder("small", uri)
    recorder.start_sweep("small-1", {"tracking.uri": "http://me:secret@host"}, {QUESTION_TAG: "a | b <b> *c*"})
    for method in ("lora", "lora_fa"):
        for lr in LADDERS[method]:
            for seed in (0, 1):
                trial = MadeUpTrial(trial_id=f"{method}-{lr:g}-{seed}", method=method, rank=16, lr=lr, seed=seed)
                record_trial(recorder, trial)
    recorder.end_sweep("FINISHED")
    return load_comparison("small", uri)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A task with an accuracy."""
    uri = default_tracking_uri(str(tmp_path_factory.mktemp("words")), None)
    record_word_problems(uri)
    return load_comparison("words", uri)


def load_as_pefts_app_does(folder: Path) -> pd.DataFrame:
    """The fields that PEFT's `method_comparison/processing.py` reads from result files, with the types it requires."""
    rows = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        run, train, meta = result["run_info"], result["train_info"], result["meta_info"]
        assert train["status"] == "success"
        last, packages = train["metrics"][-1], meta["package_info"]
        rows.append(
            {
                "experiment_name": run["experiment_name"],
                "model_id": run["train_config"]["model_id"],
                "peft_type": run["peft_config"]["peft_type"] if run["peft_config"] else "full-finetuning",
                "accelerator_memory_reserved_avg": train["accelerator_memory_reserved_avg"],
                "accelerator_memory_max": train["accelerator_memory_max"],
                "accelerator_memory_reserved_99th": train["accelerator_memory_reserved_99th"],
                "total_time": run["total_time"],
                "train_time": train["train_time"],
                "file_size": train["file_size"],
                "num_trainable_params": train["num_trainable_params"],
                "test_accuracy": last["test accuracy"],
                "train_loss": last["train loss"],
                "train_samples": last["train samples"],
                "train_total_tokens": last["train total tokens"],
                "peft_branch": run["peft_branch"],
                "created_at": run["created_at"],
                "system_info": meta["system_info"],
                **{name: packages[f"{name}-version"] for name in ("peft", "transformers", "datasets", "torch")},
                "bitsandbytes": packages["bitsandbytes-version"],
            }
        )
    whole = ["accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"]
    whole += ["file_size", "num_trainable_params", "train_samples", "train_total_tokens"]
    types: dict[str, Any] = dict.fromkeys(whole, int)
    types |= dict.fromkeys(["total_time", "train_time", "test_accuracy", "train_loss"], float)
    types |= dict.fromkeys(["experiment_name", "model_id", "peft_type", "peft_branch", "created_at"], "string")
    frame = pd.DataFrame(rows).astype(types)
    frame["created_at"] = pd.to_datetime(frame["created_at"])
    return frame


def test_pefts_app_loads_a_file_per_seed_and_choice(small: Comparison, tmp_path: Path) -> None:
    assert write_report(small, tmp_path / "results", "peft") == []
    frame = load_as_pefts_app_does(tmp_path / "results").set_index("experiment_name")
    assert sorted(frame.index) == [
        "lora/lora-0.001-0",
        "lora/lora-0.001-1",
        "lora_fa/lora_fa-0.003-0",
        "lora_fa/lora_fa-0.003-1",
    ]
    row = frame.loc["lora/lora-0.001-0"]
    assert row["peft_type"] == "LORA"
    assert row["accelerator_memory_max"] == (269 + 96 + 604 + 140) * 2**20
    assert row["train_time"] == pytest.approx(500 * 0.084)
    assert row["train_samples"] == 4000
    assert row["train_total_tokens"] == 500 * 700
    assert row["num_trainable_params"] == 16 * 57_600
    own = small.curves[(small.curves["trial_id"] == "lora-0.001-0") & (small.curves["key"] == "train/loss")]
    assert row["train_loss"] == own["value"].iloc[-1]
    assert pd.isna(row["test_accuracy"])


def test_a_peft_file_holds_the_accuracy_of_every_evaluation(answered: Comparison, tmp_path: Path) -> None:
    assert write_report(answered, tmp_path / "results", "peft") == []
    row = answered.table.set_index("trial_id").loc["lora-0.003-0"]
    content = json.loads((tmp_path / "results" / "lora-0.003-0.json").read_text(encoding="utf-8"))
    *looks, last = content["train_info"]["metrics"]
    accuracy = row["eval/accuracy"]
    assert [(look["step"], look["valid accuracy"]) for look in looks] == [
        (0, 0.05),
        (250, accuracy - 0.1),
        (500, accuracy),
    ]
    assert [look["train samples"] for look in looks] == [0, 2000, 4000]
    assert last["test accuracy"] == row["test/accuracy"]
    accuracies = load_as_pefts_app_does(tmp_path / "results").set_index("experiment_name")["test_accuracy"]
    assert accuracies["lora/lora-0.003-0"] == row["test/accuracy"]


def test_pefts_type_is_the_method_whatever_label_it_goes_by(tmp_path: Path) -> None:
    uri = default_tracking_uri(str(tmp_path), None)
    recorder = Recorder("labelled", uri)
    recorder.start_sweep("labelled-1", {}, {})
    trial = MadeUpTrial(trial_id="a", method="lora_fa", rank=16, lr=1e-3, seed=0)
    record_trial(recorder, trial, {LABEL_TAG: "frozen A"})
    recorder.end_sweep("FINISHED")
    comparison = load_comparison("labelled", uri)
    assert [choice.method for choice in load_verdict(comparison).choices] == ["frozen A"]
    write_peft_results(load_record(comparison), [load_verdict(comparison)], tmp_path / "results")
    (file,) = (tmp_path / "results").glob("*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["run_info"]["peft_config"]["peft_type"] == "LORA_FA"


def test_a_trial_without_start_time_gets_that_of_its_sweep(small: Comparison, tmp_path: Path) -> None:
    record = load_record(small)
    undated = {trial_id: replace(run, started=None) for trial_id, run in record.trials.items()}
    of_the_sweep = replace(record, trials=undated, started=1_700_000_000.0)
    write_peft_results(of_the_sweep, [load_verdict(small)], tmp_path / "dated")
    dates = load_as_pefts_app_does(tmp_path / "dated")["created_at"]
    assert set(dates) == {pd.Timestamp("2023-11-14T22:13:20+00:00")}
    write_peft_results(replace(of_the_sweep, started=None), [load_verdict(small)], tmp_path / "undated")
    assert load_as_pefts_app_does(tmp_path / "undated")["created_at"].isna().all()


def test_a_trial_without_required_figures_has_no_peft_file(tmp_path: Path) -> None:
    recorder = Recorder("cpu", default_tracking_uri(str(tmp_path), None))
    recorder.start_sweep("cpu-1", {}, {})
    recorder.start_trial("lora-1", {"method.name": "lora", "seed": 0}, {})
    recorder.log_summary("lora-1", {"eval/final_loss": 2.0})
    recorder.end_trial("lora-1", "FINISHED")
    recorder.end_sweep("FINISHED")
    comparison = load_comparison("cpu", recorder.tracking_uri)
    with pytest.raises(ValueError, match=r"--format peft: .*lora-1: no file.*memory/peak_reserved_bytes"):
        write_report(comparison, tmp_path / "results", "peft")
    assert not (tmp_path / "results").exists()


def test_the_csv_has_the_choices_with_their_figures(small: Comparison, tmp_path: Path) -> None:
    write_report(small, tmp_path / "report.csv")
    lora, lora_fa = csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text(encoding="utf-8")))
    values = small.table.set_index("trial_id").loc[["lora-0.001-0", "lora-0.001-1"], "test/loss"]
    assert (lora["method"], lora["lr"], lora["metric"], lora["test_num"]) == ("lora", "0.001", "test/loss", "2")
    assert float(lora["test_mean"]) == pytest.approx(float(values.mean()), abs=1e-12)
    assert float(lora["test_std"]) == pytest.approx(float(values.std()), abs=1e-12)
    assert (lora["expected_low"], lora["behind_at_most"]) == ("", "")  # two seeds: nothing is claimed
    assert (lora_fa["at_edge"], lora["at_edge"]) == ("lr", "")


def test_the_json_says_what_the_verdict_says(small: Comparison, tmp_path: Path) -> None:
    write_report(small, tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    verdict = load_verdict(small)
    (found,) = content["verdicts"]
    assert found["sentences"] == list(verdict.sentences)
    assert found["choices"][0]["test"]["mean"] == verdict.choices[0].test.mean  # type: ignore[union-attr]
    assert found["answer"]["sentence"] == verdict.sentences[0]
    assert found["comparison"]["num_seeds"] == 2
    assert found["comparison"]["pairs"][0]["low"] is None  # infinite: nothing is known with two seeds
    assert len(content["trials"]) == 12


def test_markdown_has_verdict_and_tables_with_escaped_text(small: Comparison, tmp_path: Path) -> None:
    write_report(small, tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == r"# a \| b &lt;b> \*c\*"
    header = next(line for line in lines if line.startswith("| method |"))
    body = [line for line in lines if line.startswith(("| lora |", r"| lora\_fa |"))]
    assert len(body) == 2
    assert all(line.count(" | ") == header.count(" | ") for line in body)
    assert "2 seeds" in body[0]
    assert "## Every method at its best setting" in lines
    assert any(line.startswith("**No claim about methods: the methods share 2 seeds") for line in lines)
    assert "## These trained models, not their methods" in lines


def test_the_format_is_asked_for_or_told_by_the_suffix() -> None:
    assert format_of(Path("a/b.HTML"), None) == "html"
    assert format_of(Path("a/b"), "peft") == "peft"
    for out, asked, key in (("b.txt", None, "--out b.txt"), ("b", None, "--out b"), ("b.html", "pdf", "--format pdf")):
        with pytest.raises(ValueError, match=rf"{key}: no such format; allowed: a file ending in \.html"):
            format_of(Path(out), asked)


def test_a_place_that_cannot_be_written_is_the_users_mistake(small: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out .*file/report\.html: cannot be written"):
        write_report(small, tmp_path / "file" / "report.html")


def test_axes_can_be_contestants_of_their_own(small: Comparison, tmp_path: Path) -> None:
    write_report(small, tmp_path / "report.csv", apart=["lr"])
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text(encoding="utf-8"))))
    assert sorted(row["method"] for row in rows if row["method"].startswith("lora lr")) == [
        "lora lr 0.0003",
        "lora lr 0.001",
        "lora lr 0.003",
    ]
    write_report(small, tmp_path / "report.html", apart=["lr"])
    assert "lora_fa lr 0.0003" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_report_is_kept_with_the_sweeps_run(small: Comparison, tmp_path: Path) -> None:
    keep_report(small, tmp_path / "small-1.html")
    client = MlflowClient(tracking_uri=small.tracking_uri)
    kept = Path(client.download_artifacts(small.sweep_run_id, "report/report.html", str(tmp_path)))
    assert kept.read_text(encoding="utf-8") == (tmp_path / "small-1.html").read_text(encoding="utf-8")
    assert client.get_run(small.sweep_run_id).info.status == "FINISHED"


def test_a_sweep_does_not_fail_if_its_report_fails(small: Comparison, tmp_path: Path) -> None:
    told: list[str] = []
    left = leave_report("small", small.tracking_uri, "small-1", tmp_path, told.append)
    assert (left, told) == (tmp_path / "small-1.html", [])
    client = MlflowClient(tracking_uri=small.tracking_uri)
    kept = Path(client.download_artifacts(small.sweep_run_id, "report/report.html", str(tmp_path)))
    assert kept.read_text(encoding="utf-8") == (tmp_path / "small-1.html").read_text(encoding="utf-8")
    (tmp_path / "full" / "small-1.html").mkdir(parents=True)
    absent = default_tracking_uri(str(tmp_path / "absent"), None)
    for uri, folder, reason in ((small.tracking_uri, tmp_path / "full", "directory"), (absent, tmp_path, "no MLflow")):
        told.clear()
        assert leave_report("small", uri, "small-1", folder, told.append) is None
        (sentence,) = told
        assert reason in sentence
        assert sentence.endswith("to write it: loragrid report small --sweep small-1 --out report.html")


def test_python_and_the_command_line_write_the_same_report(small: Comparison, tmp_path: Path) -> None:
    assert lg.write_report(small, str(tmp_path / "page.html")) == []
    assert lg.write_report(lg.load_comparison("small", small.tracking_uri), tmp_path / "again.html") == []
    assert (tmp_path / "page.html").read_text("utf-8") == (tmp_path / "again.html").read_text("utf-8")
    lg.write_report(small, tmp_path / "report.csv", apart=["lr"])
    assert "lora lr 0.001" in (tmp_path / "report.csv").read_text("utf-8")


def test_secrets_in_addresses_are_not_in_the_page(small: Comparison, tmp_path: Path) -> None:
    assert "secret" in str(load_record(small).experiment_yaml)
    write_report(small, tmp_path / "report.html")
    assert "secret" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", EXPERIMENTS, ids=[file.stem for file in EXPERIMENTS])
def test_the_file_that_a_sweep_keeps_is_the_same_experiment(file: Path) -> None:
    experiment = load_experiment(file, ["training.batch_size=3"])
    text = experiment_to_yaml(experiment)
    assert experiment_from_mapping(yaml.safe_load(text), "kept") == experiment
    recorded = {key: format_parameter(value) for key, value in sweep_parameters(experiment).items()}
    rebuilt = rebuild_experiment(recorded)
    assert rebuilt is not None
    assert experiment_from_mapping(yaml.safe_load(rebuilt), "rebuilt") == experiment


def test_an_experiment_with_cut_parameters_is_not_rebuilt() -> None:
    assert rebuild_experiment({"name": "long", "methods": "[" + "1," * 3000}) is None
    assert rebuild_experiment({}) is None


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["compare", "small"], "apart: 'nonsense' is no axis of this sweep; allowed: lr"),
        (["compare", "small", "--plot", "curves.png"], "apart: 'nonsense' is no axis of this sweep; allowed: lr"),
        (["report", "small", "--out", "page.html"], "apart: 'nonsense' is no axis of this sweep; allowed: lr"),
        (["compare", "small", "--csv"], "--apart: the CSV"),
        (["compare", "small", "--json"], "--apart: the CSV"),
    ],
)
def test_an_unknown_apart_axis_is_refused_before_any_output(
    small: Comparison,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    key: str,
) -> None:
    from loragrid.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["loragrid", *words, "--tracking-uri", small.tracking_uri, "--apart", "nonsense", "--apart", "lr"]
    )
    with pytest.raises(SystemExit) as refused:
        main()
    printed = capsys.readouterr()
    assert (refused.value.code, printed.out) == (2, "")
    assert key in " ".join(printed.err.split())
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_report_or_refuses(
    small: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loragrid.cli.main import main

    out = tmp_path / "new folder" / "report.html"
    words = ["loragrid", "report", "small", "--tracking-uri", small.tracking_uri, "--out"]
    monkeypatch.setattr(sys, "argv", [*words, str(out)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert f"report  {out}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "report.doc")])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "no such format" in capsys.readouterr().err
