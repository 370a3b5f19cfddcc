"""`loragrid plan` refuses what `run` refuses, shows the rows, and keeps stdout for what was asked."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from loragrid.cli import main as cli
from loragrid.cli.plan_table import render_plan
from loragrid.planning.dry_run import prepare
from loragrid.trials.load import experiment_from_mapping
from tests.support.refusals import Refuses, Write, check_message, everything_in


@pytest.fixture
def run_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["loragrid", "plan", *arguments])
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return code or 0, printed.out, printed.err

    return run


@pytest.fixture
def damaged(valid_experiment: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the model with one weight that is not a number."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in Path(valid_experiment["model"]["name"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("data.name", "missing.jsonl", "error: data.name: missing.jsonl: there is no such file"),
        ("data.num_eval", 97, "error: data.num_eval: 97: "),
        ("data.columns", {"prompt": "question"}, "has no column question"),
        ("data.max_length", 4, "longer than max_length"),
        ("training", {"epochs": 1, "warmup_steps": 50}, "error: training.warmup_steps: 50: longer than the training"),
    ],
)
def test_a_dry_run_ends_as_the_run_would(write: Write, run_plan: Any, key: str, value: object, part: str) -> None:
    code, out, err = run_plan(str(write(key, value)))
    assert out == ""
    check_message(code, err, part)


def test_a_damaged_checkpoint_is_found_when_weights_are_loaded(write: Write, run_plan: Any, damaged: Path) -> None:
    file = str(write("model.name", str(damaged)))
    assert run_plan(file)[0] == 0
    code, out, err = run_plan(file, "--load")
    assert out == ""
    check_message(code, err.splitlines(keepends=True)[-1], "error: model.name: ", "up_proj.weight", "NaN")
    assert err.startswith(f"model {damaged}: loaded as float32, 0.00 GiB of memory; checking it\n")


def test_unused_weights_are_named_when_weights_are_loaded(
    write: Write, run_plan: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "longer"))
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(2) for layer in (2, 3)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run_plan(str(write("model.name", str(folder))), "--load")
    assert code == 0
    assert "does not use these weights of its checkpoint: model.layers.{2, 3}.*\n" in err


def test_a_plan_refuses_a_store_that_mlflow_cannot_open(
    write: Write, run_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_message(*run_plan(str(write("tracking.uri", "$HOME/runs")))[::2], "tracking.uri: $HOME/runs: $HOME, which is")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    check_message(*run_plan(str(write("question", "Which?")))[::2], "MLFLOW_TRACKING_URI: 'mlruns' is a folder")


def test_a_run_finds_it_before_store_and_ray(refuses: Refuses, write: Write, damaged: Path) -> None:
    refuses(write("model.name", str(damaged)), "error: model.name: ", "up_proj.weight", "NaN")


def test_a_loaded_plan_says_that_the_model_can_train(write: Write, run_plan: Any) -> None:
    code, out, err = run_plan(str(write("question", "Which?")), "--load")
    assert code == 0
    assert out.startswith("Which?")
    assert err.rstrip().endswith("trains as a causal language model")


def test_json_alone_is_on_stdout(write: Write, run_plan: Any) -> None:
    code, out, _ = run_plan(str(write("training", {"epochs": 0.5, "batch_size": 4})), "--json")
    assert code == 0
    written = json.loads(out)
    (rows,) = written["rows"]
    assert rows["rows"] == {"train": 88, "eval": 8, "test": 0}
    assert written["notes"][0].startswith("11 steps of 4 rows train on 44 of the 88 train rows")
    parameters = written["trials"][0]["parameters"]
    assert (parameters["training.steps"], parameters["training.epochs"], parameters["data.num_train"]) == (11, 0.5, 88)


def test_the_plan_says_what_the_run_says(valid_experiment: dict[str, Any]) -> None:
    said: list[str] = []
    the_plan, _ = prepare(experiment_from_mapping(valid_experiment, "x"), said.append)
    assert len(said) > 1
    printed = io.StringIO()
    Console(file=printed, width=1000).print(render_plan(the_plan))
    assert set(said) <= {line.rstrip() for line in printed.getvalue().splitlines()}


def test_a_plan_fits_into_80_columns(valid_experiment: dict[str, Any]) -> None:
    valid_experiment["training"] = {"epochs": 2, "batch_size": 4}
    the_plan, _ = prepare(experiment_from_mapping(valid_experiment, "x"))
    printed = io.StringIO()
    Console(file=printed, width=80).print(render_plan(the_plan))
    assert all(len(line.rstrip()) <= 80 for line in printed.getvalue().splitlines())
    assert "44 steps (2 epochs) of 4 rows" in " ".join(printed.getvalue().split())


def test_a_dry_run_leaves_only_the_kept_rows(
    valid_experiment: dict[str, Any], tmp_path: Path, run_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(valid_experiment), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = everything_in(tmp_path)
    assert run_plan(str(file))[0] == 0
    assert everything_in(tmp_path) == before
