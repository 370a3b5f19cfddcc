"""A base on the hub is taken at the recorded commit, wherever its branch is at the time of the export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from tests.support.documents import ROOT
from tests.support.fake_hub import COMMIT, SECOND_COMMIT, FakeHub, serving

pytestmark = pytest.mark.heavy

NOTHING_THERE = "http://127.0.0.1:9"

TRAIN = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from loragrid.config.experiment import ModelConfig
from tests.support.exported_trials import record_trials
from tests.support.small_packs import make_setup
local, rows, store = map(Path, sys.argv[1:])
setup = make_setup(local, rows, "float32")
model = ModelConfig(name="tiny/llama", dtype="float32")
trial = replace(setup.trial("lora", lr=0.02, steps=2), trial_id="trial", model=model)
recorded = record_trials(setup, [trial], store)
torch.save(recorded.logits(0), store / "logits.pt")
"""

EXPORT = """
import sys
import torch
from loragrid.tracking.artifacts import export_run
from tests.support.exported_trials import run_snippet
store, out, merged = sys.argv[1:]
try:
    export = export_run("trial", f"sqlite:///{store}/mlflow.db", out, merged=merged == "merged")
except ValueError as error:
    print(error)
    raise SystemExit(2)
print(*export.notices)
print(export.snippet)
names = run_snippet(export.snippet)
torch.save(dict(names["model"].named_parameters()), out + ".pt")
"""


def python(code: str, address: str, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: the hub's clients read their settings at import."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    roots = [str(ROOT / "platform"), str(ROOT / "methods"), str(ROOT)]
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(roots)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=inherited | settings, capture_output=True, text=True, timeout=300, check=False, cwd=home
    )


def test_the_recorded_commit_is_exported_after_the_branch_moved(
    tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path
) -> None:
    first = {path.name: path.read_bytes() for path in tiny_llama_dir.iterdir()}
    moved = {name: tensor + 0.5 for name, tensor in load(first["model.safetensors"]).items()}
    second = first | {"model.safetensors": save(moved, metadata={"format": "pt"}), "chat_template.jinja": b"moved"}
    commits = {COMMIT: first, SECOND_COMMIT: second}
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "store").mkdir()
    with serving(FakeHub({"models/tiny/llama": commits})) as hub:
        done = python(TRAIN, hub.address, home, tiny_llama_dir, chat_jsonl, tmp_path / "store")
        assert done.returncode == 0, done.stderr
        hub.revisions["main"] = SECOND_COMMIT
        for kind in ("merged", "adapter"):
            done = python(EXPORT, hub.address, home, tmp_path / "store", tmp_path / kind, kind)
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout.startswith("\n"), "no notice"
            assert (tmp_path / kind / "chat_template.jinja").read_bytes() == first["chat_template.jinja"]
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("tiny/llama", COMMIT)
        assert f'"tiny/llama", revision="{COMMIT}", dtype="float32"' in done.stdout
        embeddings = load(first["model.safetensors"])["model.embed_tokens.weight"]
        merged = torch.load(tmp_path / "merged.pt")
        assert torch.equal(merged["model.embed_tokens.weight"], embeddings)
        adapted = torch.load(tmp_path / "adapter.pt")
        assert torch.equal(adapted["base_model.model.model.embed_tokens.weight"], embeddings)
    offline = python(EXPORT, NOTHING_THERE, home, tmp_path / "store", tmp_path / "later", "merged")
    assert offline.returncode == 0, "the commit is in the hub's cache"
    empty = tmp_path / "empty"
    empty.mkdir()
    with serving(FakeHub({"models/tiny/llama": {SECOND_COMMIT: second}}, {"main": SECOND_COMMIT})) as hub:
        done = python(EXPORT, hub.address, empty, tmp_path / "store", tmp_path / "gone", "merged")
    assert done.returncode == 2
    assert f"the hub has no revision {COMMIT} of it" in done.stdout
    assert not (tmp_path / "gone").exists()
