"""Hub names are loaded at their revision, later without a network; wrong names are refused at once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_hub import COMMIT, FakeHub, serving

README = b"---\nlicense: mit\n---\n"
ROWS = b"".join(json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(8))
NOTHING_THERE = "http://127.0.0.1:9"


@pytest.fixture
def hub(tiny_llama_dir: Path) -> Iterator[str]:
    """A hub with a model tiny/llama and data tiny/chat, both at `v1`."""
    llama = {path.name: path.read_bytes() for path in tiny_llama_dir.iterdir()}
    chat = {"README.md": README, "train.jsonl": ROWS}
    repositories = {"models/tiny/llama": {COMMIT: llama}, "datasets/tiny/chat": {COMMIT: chat}}
    with serving(FakeHub(repositories)) as served:
        yield served.address


ASK_HUB = """
import sys
from loragrid.config.experiment import DataConfig, ModelConfig
for line in sys.argv[1:]:
    what, name, revision, split = line.split()
    try:
        if what == "model":
            from loragrid.models.loading import load_base, load_tokenizer, model_digest
            model = ModelConfig(name=name, revision=revision)
            print(load_base(model).config.hidden_size, len(load_tokenizer(model)), model_digest(model))
        else:
            from loragrid.data.files.sources import open_train_rows
            rows = open_train_rows(DataConfig(name=name, revision=revision, split=split))
            print(rows.num_rows, rows.read([2, 1]), rows.fingerprint)
    except ValueError as error:
        print(error)
"""


def ask(address: str, home: Path, *lines: str) -> tuple[list[str], str]:
    """Load what the lines name in a process of its own: the hub's clients read their settings at import."""
    import loragrid

    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    roots = [str(Path(next(iter(loragrid.__path__))).parent), os.environ.get("PYTHONPATH", "")]
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    command = [sys.executable, "-c", ASK_HUB, *lines]
    done = subprocess.run(command, env=inherited | settings, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.splitlines(), done.stderr


@pytest.mark.heavy
def test_revisions_are_loaded_and_later_without_the_hub(hub: str, tmp_path: Path) -> None:
    lines = ("model tiny/llama v1 -", "data tiny/chat v1 train")
    texts = [{"text": "row 2"}, {"text": "row 1"}]
    loaded = ([f"32 300 tiny/llama@{COMMIT}", f"8 {texts} tiny/chat@{COMMIT}/None/train"], "")
    assert ask(hub, tmp_path, *lines) == loaded
    assert ask(NOTHING_THERE, tmp_path, *lines) == loaded


def test_what_the_hub_does_not_have_is_refused(hub: str, tmp_path: Path) -> None:
    lines = (
        "model tiny/llama v2 -",
        "model tiny/absent v1 -",
        "data tiny/chat v2 train",
        "data tiny/absent v1 train",
        "data tiny/chat v1 absent",
    )
    answers, chatter = ask(hub, tmp_path, *lines)
    embedded = "unknown model: not an embedded name (smollm2-135m-instruct)"
    here = f"{embedded}, not a local folder ({Path.cwd()}/tiny/"
    files = ".jsonl, .json, .csv or .parquet"
    data = f"unknown data: not an embedded name (chitchat), not a local {files} file, and on the hub: "
    assert answers == [
        f"model.name: tiny/llama: {here}llama), and on the hub: the hub has no revision v2 of it",
        f"model.name: tiny/absent: {here}absent), and on the hub: "
        "the hub has no such model, or your account has no access to it",
        f"data.name: tiny/chat: {data}the hub has no revision v2 of it",
        f"data.name: tiny/absent: {data}the hub has no such dataset, or your account has no access to it",
        "data.name: tiny/chat, split absent: cannot be loaded: Unknown split \"absent\". Should be one of ['train'].",
    ]
    assert chatter == ""


def test_unknown_names_without_a_network_are_refused_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    answers, chatter = ask(NOTHING_THERE, tmp_path, "model tiny/llama v1 -", "data tiny/chat v1 train")
    assert answers[0].startswith("model.name: tiny/llama: unknown model")
    assert answers[1].startswith("data.name: tiny/chat: unknown data")
    assert all("the hub could not be reached" in answer for answer in answers)
    assert chatter == ""
    # The loaders' own retries would sleep for 23 seconds for each.
    assert time.monotonic() - started < 30
