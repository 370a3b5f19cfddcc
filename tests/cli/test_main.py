"""The command line: its output, its exit codes, and messages instead of tracebacks for users' mistakes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loragrid.cli import main as cli
from loragrid_methods import get_method, method_names

ROOT = Path(__file__).resolve().parents[2]

# What Ray, Tune and Train print of their own accord; the first two come from C++ and from a state query.
NOISE = (
    "[mutex.cc",
    "Failed to query Ray Train Controller",
    "(raylet)",
    "WARNING",
    "ERROR",
    "Configuration for experiment",
    "View detailed results",
    "Traceback",
    "Trial ",
)


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def loragrid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process: for commands that start nothing."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["loragrid", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(code=ended.value.code, out=printed.out, err=printed.err)

    return run


def run_command(*arguments: object, cwd: Path | None = None, **environment: str) -> Done:
    """Runs it as a user does, in a process of its own whose output goes into a pipe."""
    path = os.pathsep.join(str(ROOT / source_root) for source_root in ("platform", "methods"))
    done = subprocess.run(
        [sys.executable, "-m", "loragrid", *(str(argument) for argument in arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return Done(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture(scope="module")
def keys(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "name": "tiny",
        "question": "Does the [command] line work?",
        "model": {"name": str(tiny_llama_dir), "dtype": "float32"},
        "data": {"name": str(chat_jsonl), "max_length": 96, "num_eval": 8},
        "training": {"steps": 3, "batch_size": 4, "lr": 1e-2, "measure_steps": 1},
        "methods": ["lora", {"name": "vera", "rank": 8}],
        "workers": {"cpus_per_worker": 1},
        "storage": {"path": str(tmp_path_factory.mktemp("store"))},
    }


@pytest.fixture
def write(keys: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes an experiment file with some of its keys changed."""

    def write_file(**changes: Any) -> Path:
        file = tmp_path / "experiment.yaml"
        file.write_text(yaml.safe_dump({**keys, **changes}), encoding="utf-8")
        return file

    return write_file


def check_refused(done: Done, *parts: str) -> None:
    """Exit code 2 and one message on stderr, with these parts and no traceback."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert "error:" in done.err
    for part in parts:
        assert part in done.err, done.err


def test_a_missing_file_is_named(loragrid: Command, tmp_path: Path) -> None:
    check_refused(loragrid("run", tmp_path / "nowhere.yaml"), "nowhere.yaml")


def test_an_unknown_key_is_named_with_its_file(loragrid: Command, write: Callable[..., Path]) -> None:
    file = write(trainig={"steps": 1})
    check_refused(loragrid("run", file), str(file), "trainig", "training")


def test_an_unknown_method_is_answered_with_all_methods(loragrid: Command, write: Callable[..., Path]) -> None:
    check_refused(loragrid("plan", write(methods=["lorra"])), "methods.0", "lorra", *method_names())


def test_a_bad_override_is_named(loragrid: Command, write: Callable[..., Path]) -> None:
    check_refused(loragrid("run", write(), "--set", "training.steps=none"), "training.steps", "none", "whole number")


def test_an_unknown_model_is_named(loragrid: Command, write: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "no" / "such" / "model"
    check_refused(loragrid("run", write(model={"name": str(folder)})), "model.name", str(folder))


def test_a_target_that_matches_no_layer_is_named(loragrid: Command, write: Callable[..., Path]) -> None:
    methods = [{"name": "lora", "target_modules": ["no_such_proj"]}]
    check_refused(loragrid("run", write(methods=methods)), "lora", "no_such_proj", "q_proj")


def test_a_missing_column_is_named(loragrid: Command, write: Callable[..., Path], keys: dict[str, Any]) -> None:
    data = {**keys["data"], "columns": {"prompt": "question"}}
    check_refused(loragrid("run", write(data=data)), "question", "prompt, completion")


@pytest.mark.end_to_end
def test_more_workers_than_the_machine_holds_are_refused(write: Callable[..., Path]) -> None:
    done = run_command("run", write(workers={"num_workers": 4, "cpus_per_worker": 1000}))
    check_refused(done, "workers", "do not fit on this machine")


@pytest.mark.heavy
def test_an_address_where_no_cluster_answers_is_named(write: Callable[..., Path], tmp_path: Path) -> None:
    done = run_command("run", write(), "--address", "127.0.0.1:1")
    assert done.code == 3, done
    (line,) = done.err.strip().splitlines()
    assert line.startswith(
        "error: no Ray cluster could be reached (--address 127.0.0.1:1, tried twice): Connection ref"
    )


@pytest.mark.heavy
def test_a_ray_that_cannot_start_has_its_own_exit_code(write: Callable[..., Path], tmp_path: Path) -> None:
    no_folder = tmp_path / "file"
    no_folder.touch()
    done = run_command("run", write(), RAY_TMPDIR=str(no_folder))
    assert done.code == 3, done
    (line,) = done.err.strip().splitlines()
    assert line.startswith(
        "error: Ray could not be started on this machine (no --address, tried twice): Not a directory"
    )
    assert line.endswith("to mend it: set RAY_TMPDIR to an existing folder that can be written and has room")


@pytest.mark.parametrize("command", [["compare", "tiny"], ["export", "lora-1", "--to", "out"], ["ui"]])
def test_a_folder_without_a_store_is_named(loragrid: Command, tmp_path: Path, command: list[str]) -> None:
    store = tmp_path / "empty"
    check_refused(loragrid(*command, "--storage", store), str(store), "run an experiment first")


def test_an_unknown_command_is_a_wrong_request(loragrid: Command) -> None:
    assert loragrid("train").code == 2


@pytest.mark.heavy
def test_a_plan_as_json_starts_no_ray_and_writes_nothing(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write(storage={"path": str(tmp_path / "store")})
    code = (
        "import sys\nfrom loragrid.cli.main import main\n"
        f"sys.argv = ['loragrid', 'plan', {str(file)!r}, '--json']\n"
        "try:\n    main()\nfinally:\n"
        "    assert not {'ray', 'mlflow'} & sys.modules.keys(), 'the plan imports what it does not need'"
    )
    path = os.pathsep.join(str(ROOT / source_root) for source_root in ("platform", "methods"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [trial["parameters"]["method.name"] for trial in plan["trials"]] == ["lora", "vera"]
    assert [trial["trainable"] for trial in plan["trials"]] == [8192, 624]
    (pack,) = plan["packs"]
    assert pack["pack_id"] == "pack-000"
    assert pack["trials"] == [trial["trial_id"] for trial in plan["trials"]]
    assert pack["gpu_engine"]["mode"] == "graph"
    assert not (tmp_path / "store").exists()


def test_a_plan_is_a_table_of_trials(loragrid: Command, write: Callable[..., Path]) -> None:
    done = loragrid("plan", write(), "--set", "grid.seed=[0, 1]")
    assert done.code == 0
    assert "4 trials" in done.out
    assert done.out.count("lora-") == 2
    assert "8,192" in done.out


def test_a_plan_of_one_trial_speaks_of_one_of_each(loragrid: Command, write: Callable[..., Path]) -> None:
    training = {"steps": 1, "batch_size": 1}
    text = " ".join(loragrid("plan", write(methods=["lora"], training=training)).out.split())
    assert "1 trial in 1 pack;" in text
    assert "1 step of 1 row" in text
    assert "pack-000 (1 trial)" in text


def test_methods_prints_every_card(loragrid: Command) -> None:
    done = loragrid("methods")
    text = " ".join(done.out.split())
    assert done.code == 0
    for name in method_names():
        assert get_method(name).card.title in text
        assert f"name in an experiment file: {name}" in text
    assert "hyperparameter" in done.out


def test_methods_prints_one_card_and_refuses_an_unknown_name(loragrid: Command) -> None:
    done = loragrid("methods", "vera")
    assert get_method("vera").card.title in done.out
    assert get_method("lora_fa").card.title not in done.out
    check_refused(loragrid("methods", "verra"), "verra", "vera")


@pytest.fixture(scope="module")
def relative(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment's file; it names model and rows by paths relative to its folder."""
    folder = tmp_path_factory.mktemp("experiments")
    named = {part: {**keys[part], "name": os.path.relpath(keys[part]["name"], folder)} for part in ("model", "data")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys | named), encoding="utf-8")
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(relative: Path) -> Done:
    """A sweep, run as a user runs it beside its file, on a Ray of its own."""
    return run_command("run", relative.name, cwd=relative.parent, RAY_ADDRESS="")


@pytest.mark.smoke
@pytest.mark.end_to_end
def test_a_run_prints_its_table_and_nothing_of_rays(finished: Done, keys: dict[str, Any]) -> None:
    assert finished.code == 0, finished
    assert "Does the [command] line work?" in finished.out
    assert "step 3/3" in finished.out
    assert "lora" in finished.out
    assert "eval loss before training" in finished.out
    store = Path(keys["storage"]["path"])
    assert f"sqlite:///{store / 'mlflow.db'}" in finished.out
    assert (store / "tiny-1.png").stat().st_size > 10_000
    assert f"{store / 'tiny-1.png'}" in finished.out
    assert finished.err == ""
    for noise in NOISE:
        assert noise not in finished.out


@pytest.mark.smoke
@pytest.mark.end_to_end
def test_compare_prints_table_csv_json_and_picture(
    finished: Done, loragrid: Command, keys: dict[str, Any], tmp_path: Path
) -> None:
    storage = ("--storage", keys["storage"]["path"])
    table = loragrid("compare", "tiny", *storage, "--plot", tmp_path / "curves.png")
    assert (table.code, table.err) == (0, "")
    assert "vera" in table.out
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    lines = loragrid("compare", "tiny", *storage, "--csv").out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("trial_id,status,method")
    trials = json.loads(loragrid("compare", "tiny", *storage, "--json", "--sweep", "tiny-1").out)["trials"]
    assert [trial["status"] for trial in trials] == ["FINISHED"] * 2
    check_refused(loragrid("compare", "huge", *storage), "huge", "tiny")
    check_refused(loragrid("compare", "tiny", *storage, "--sweep", "tiny-7"), "tiny-7", "tiny-1")
    check_refused(loragrid("compare", "tiny", *storage, "--csv", "--json"), "--csv", "--json")


@pytest.mark.smoke
@pytest.mark.end_to_end
def test_a_run_leaves_its_report_and_its_experiment_file(
    finished: Done, loragrid: Command, keys: dict[str, Any], relative: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    from loragrid.comparison.table import load_comparison
    from loragrid.trials.load import load_experiment

    store = Path(keys["storage"]["path"])
    page = (store / "tiny-1.html").read_text(encoding="utf-8")
    assert f"report        {store / 'tiny-1.html'}" in finished.out
    done = loragrid("report", "tiny", "--storage", store, "--out", tmp_path / "again.html")
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page
    comparison = load_comparison("tiny", f"sqlite:///{store / 'mlflow.db'}")
    for loss in comparison.table["eval/final_loss"]:
        assert f"{loss:.4f}" in page
    client = MlflowClient(tracking_uri=comparison.tracking_uri)
    kept = client.download_artifacts(comparison.sweep_run_id, "report/report.html", str(tmp_path))
    assert Path(kept).read_text(encoding="utf-8") == page
    repeated = client.download_artifacts(comparison.sweep_run_id, "experiment.yaml", str(tmp_path))
    assert load_experiment(Path(repeated)) == load_experiment(relative)


@pytest.mark.smoke
@pytest.mark.end_to_end
def test_exported_adapter_and_merged_model_have_the_same_logits(
    finished: Done, loragrid: Command, keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    storage = ("--storage", keys["storage"]["path"])
    trials = json.loads(loragrid("compare", "tiny", *storage, "--json").out)["trials"]
    for trial, given_as in zip(trials, ("trial_id", "run_id"), strict=True):
        adapter, merged = tmp_path / f"{trial['method']}-adapter", tmp_path / f"{trial['method']}-merged"
        for target, more, kind in ((adapter, (), "adapter"), (merged, ("--merged",), "merged model")):
            done = loragrid("export", trial[given_as], "--to", target, *more, *storage)
            assert (done.code, done.err) == (0, ""), done
            first, *snippet = done.out.splitlines()
            assert first.startswith(f"{kind}  {target}  (")
            assert first.endswith("iB); to load it:")
            exec("\n".join(snippet), {})
            capsys.readouterr()  # what transformers prints while the snippet loads the model
        base = AutoModelForCausalLM.from_pretrained(keys["model"]["name"])
        ids = AutoTokenizer.from_pretrained(str(merged))("Which door has the harbour?", return_tensors="pt").input_ids
        with torch.no_grad():
            plain = base(ids).logits
            adapted = peft.PeftModel.from_pretrained(base, str(adapter)).eval()(ids).logits
            whole = AutoModelForCausalLM.from_pretrained(str(merged))(ids).logits
        assert (adapted - plain).abs().max() > 1e-3, trial["method"]
        torch.testing.assert_close(whole, adapted, rtol=1e-5, atol=1e-5)
        check_refused(loragrid("export", trial["trial_id"], "--to", adapter, *storage), str(adapter), "exists")
    check_refused(loragrid("export", "lora-0", "--to", tmp_path / "x", *storage), "lora-0", "no such run")
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def broken_llama_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config is fine and whose weights lack a layer: what only a worker finds out."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("broken") / "llama"
    shutil.copytree(tiny_llama_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.mark.end_to_end
def test_failed_trials_leave_the_others_alone_and_exit_with_1(
    ray_of_two_cpus: str, write: Callable[..., Path], keys: dict[str, Any], broken_llama_dir: Path
) -> None:
    models = [str(broken_llama_dir), keys["model"]["name"]]
    methods = [{"name": "lora", "grid": {"lr": [1e-2, 1e30]}}, {"name": "vera", "rank": 8}]
    file = write(name="failing", methods=methods, grid={"model.name": models}, model={"name": models[1]})
    done = run_command("run", file, "--address", ray_of_two_cpus, "--name", "broken", RAY_AUTH_MODE="token")
    assert done.code == 1, done
    assert done.err == ""
    assert "pack-000 failed" in done.out
    for noise in NOISE:
        assert noise not in done.out
    # In a process of its own: this one is Ray's driver, into whose output the cluster's own warnings come.
    answer = run_command("compare", "failing", "--storage", keys["storage"]["path"], "--json")
    trials = json.loads(answer.out)["trials"]
    assert len(trials) == 6
    for trial in trials:
        if trial["model.name"] == str(broken_llama_dir):
            assert trial["status"] == "FAILED"
            assert trial["reason"].startswith(f"model.name: {broken_llama_dir}: the checkpoint lacks")
            assert "layers.1.self_attn.q_proj" in trial["reason"]
        elif trial["lr"] == 1e30:
            assert trial["status"] == "FAILED"
            assert trial["reason"].startswith("diverged")
        else:
            assert trial["status"] == "FINISHED"
            assert trial["eval/final_loss"] > 0
