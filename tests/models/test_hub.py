"""Hub names are loaded at their revision, later without a network; wrong names are refused at once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = b"---\nlicense: mit\n---\n"
ROWS = b"".join(json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(8))
NOTHING_THERE = "http://127.0.0.1:9"


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub's protocol that its clients use, for a model tiny/llama and data tiny/chat at `v1`."""

    repositories: dict[str, dict[str, bytes]]

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        of_api = parts[0] == "api"
        parts = parts[1:] if of_api else parts
        kind, *parts = parts if parts[0] in ("models", "datasets") else ["models", *parts]
        files = self.repositories.get("/".join([kind, *parts[:2]]))
        if files is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[2:3] in (["revision"], ["resolve"], ["tree"]) and parts[3] not in ("v1", COMMIT):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif of_api and parts[2:3] in ([], ["revision"]):
            self.answer(200, json.dumps({"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": []}).encode())
        elif of_api and parts[2:3] == ["tree"] and not parts[4:]:
            listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in files]
            self.answer(200, json.dumps(listed).encode())
        elif parts[2:3] == ["resolve"] and parts[-1] in files:
            self.answer(200, files[parts[-1]], {"ETag": f'"{parts[-1]}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output free of requests."""


@pytest.fixture
def hub(tiny_llama_dir: Path) -> Iterator[str]:
    repositories = {
        "models/tiny/llama": {path.name: path.read_bytes() for path in tiny_llama_dir.iterdir()},
        "datasets/tiny/chat": {"README.md": README, "train.jsonl": ROWS},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"repositories": repositories}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


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
            from loragrid.data.sources import open_train_rows
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
    model = "unknown model: not an embedded name (smollm2-135m-instruct), not a local folder, and on the hub: "
    files = ".jsonl, .json, .csv or .parquet"
    data = f"unknown data: not an embedded name (chitchat), not a local {files} file, and on the hub: "
    assert answers == [
        f"model.name: tiny/llama: {model}the hub has no revision v2 of it",
        f"model.name: tiny/absent: {model}the hub has no such model, or your account has no access to it",
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
