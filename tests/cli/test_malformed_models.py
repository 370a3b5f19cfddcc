"""A malformed model folder is refused with exit code 2 and the reason; code inside it never runs."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loragrid.config.experiment import ModelConfig
from loragrid.models.loading import load_base
from tests.support.refusals import Refuses, Write, refuses_in_a_process

Make = Callable[[Path], object]


class MakesAFile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def replacing(file: str, content: str | bytes) -> Make:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def configured(**changes: object) -> Make:
    def make(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return make


def with_remote_code(file: str, content: Mapping[str, object]) -> Make:
    def make(folder: Path) -> None:
        (folder / file).write_text(json.dumps(content))
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")

    return make


def with_index(content: object) -> Make:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return make


def pickled(file: str) -> Make:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / file).write_bytes(pickle.dumps(MakesAFile(folder / "ran")))

    return make


CONFIG, TOKENIZER, WEIGHTS = "its config cannot be loaded", "its tokenizer cannot be loaded", "its weights cannot be"
REMOTE_CONFIG = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
REMOTE_TOKENIZER = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}

MODELS: dict[str, tuple[Make, str]] = {
    "config missing": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "config binary": (replacing("config.json", bytes(range(256))), CONFIG),
    "config empty": (replacing("config.json", ""), CONFIG),
    "config number": (replacing("config.json", "3"), CONFIG),
    "config list": (replacing("config.json", "[]"), CONFIG),
    "config deep": (replacing("config.json", "[" * 100_000), CONFIG),
    "config huge": (lambda folder: os.truncate(folder / "config.json", 2**30), "config.json has 1,024 MiB"),
    "config remote": (with_remote_code("config.json", REMOTE_CONFIG), CONFIG),
    "type unknown": (configured(model_type="no-such-type"), CONFIG),
    "type list": (configured(model_type=["llama"]), CONFIG),
    "size text": (configured(hidden_size="large"), "expected int, got str"),
    "size negative": (configured(hidden_size=-1), "The hidden size (-1)"),
    "heads zero": (configured(num_attention_heads=0), CONFIG),
    "vocabulary negative": (configured(vocab_size=-5), "its config describes no text model"),
    "dtype unknown": (configured(dtype="no_such_dtype"), CONFIG),
    "no text model": (replacing("config.json", '{"model_type": "vit"}'), "has no causal language model"),
    "tokenizer binary": (replacing("tokenizer.json", b"\xff\xfe\0"), TOKENIZER),
    "tokenizer list": (replacing("tokenizer.json", "[]"), TOKENIZER),
    "tokenizer cut": (lambda folder: os.truncate(folder / "tokenizer.json", 500), TOKENIZER),
    "tokenizer merges": (replacing("tokenizer.json", '{"model": {"merges": ["a b"]}}'), TOKENIZER),
    "tokenizer config list": (replacing("tokenizer_config.json", "[]"), TOKENIZER),
    "tokenizer class number": (replacing("tokenizer_config.json", '{"tokenizer_class": 3}'), TOKENIZER),
    "tokenizer remote": (with_remote_code("tokenizer_config.json", REMOTE_TOKENIZER), TOKENIZER),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), WEIGHTS),
    "weights empty": (replacing("model.safetensors", ""), WEIGHTS),
    "weights binary": (replacing("model.safetensors", b"\xff" * 100), WEIGHTS),
    "weights cut": (lambda folder: os.truncate(folder / "model.safetensors", 5000), WEIGHTS),
    "weights pickled": (pickled("pytorch_model.bin"), "pickles, which can run code"),
    "weights in pt": (pickled("model.pt"), "pickles, which can run code"),
    "weights pickled under another name": (pickled("model.safetensors"), WEIGHTS),
    "index elsewhere": (
        with_index({"weight_map": {"x": "../../x.safetensors"}}),
        "holds no file '../../x.safetensors'",
    ),
    "index of pickles": (with_index({"weight_map": {"x": "pytorch_model.bin"}}), "holds no file 'pytorch_model.bin'"),
    "index list": (with_index([]), WEIGHTS),
}


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.mark.parametrize(("make", "part"), MODELS.values(), ids=MODELS.keys())
def test_a_malformed_model_folder_is_refused_without_running_its_code(
    refuses: Refuses, write: Write, folder: Path, make: Make, part: str
) -> None:
    make(folder)
    refuses(write("model.name", str(folder)), f"error: model.name: {folder}: ", part)
    assert not (folder / "ran").exists()


def test_code_beside_a_model_that_transformers_knows_never_runs(folder: Path) -> None:
    with_remote_code(
        "config.json", json.loads((folder / "config.json").read_text()) | {**REMOTE_CONFIG, "model_type": "llama"}
    )(folder)
    base = load_base(ModelConfig(name=str(folder), dtype="float32"))
    assert type(base).__module__.startswith("transformers.")
    assert not (folder / "ran").exists()


def test_pickled_weights_are_not_even_loaded_where_they_are_harmless(folder: Path) -> None:
    base = load_base(ModelConfig(name=str(folder), dtype="float32"))
    (folder / "model.safetensors").unlink()
    torch.save(base.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"its weights cannot be loaded"):
        load_base(ModelConfig(name=str(folder), dtype="float32"))


@pytest.mark.parametrize(
    "template", ["{{ 1/0 }}", "{% for", "{% for n in range(10**9) %}{% endfor %}", "{{ ''.__class__.mro() }}"]
)
def test_a_chat_template_that_fails_is_refused_with_the_row(
    refuses: Refuses, write: Write, valid_experiment: dict[str, Any], folder: Path, tmp_path: Path, template: str
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    chat = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(chat)}\n" * 12)
    valid_experiment["model"]["name"] = str(folder)
    refuses(write("data.name", str(tmp_path / "chat.jsonl")), "error: data.name: ", "the chat template refuses it")


@pytest.mark.heavy
def test_a_real_process_unpickles_nothing_and_leaves_nothing_behind(write: Write, folder: Path, tmp_path: Path) -> None:
    pickled("pytorch_model.bin")(folder)
    file = write("model.name", str(folder))
    refuses_in_a_process(tmp_path, file, f"error: model.name: {folder}: its weights cannot be loaded")
