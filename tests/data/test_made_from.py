"""Rows are kept under all that they depend on: whatever changes tokens changes where the rows are kept."""

import ast
import copy
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

import loragrid
from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data import made_from as described
from loragrid.data.dataset import load_data
from loragrid.data.made_from import DESCRIBED_OTHERWISE, ROOMS, code_digest, made_from
from loragrid.data.splits import open_sources
from loragrid.data.tokenizer_digest import tokenizer_digest
from loragrid.models.loading import load_tokenizer
from tests.support.tiny_tokenizers import byte_level, save_tiny_llama

PACKAGE = Path(next(iter(loragrid.__path__)))


def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(bos="<s>")


def with_token(name: str) -> Callable[[PreTrainedTokenizerFast], Any]:
    return lambda tokenizer: setattr(tokenizer, f"{name}_token", "<|im_start|>")


def with_class(tokenizer: PreTrainedTokenizerFast) -> None:
    class Other(PreTrainedTokenizerFast):
        pass

    tokenizer.__class__ = Other


def with_named_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer._set_model_specific_special_tokens({"image_token": "<|im_start|>"})


def with_normaliser(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


CHANGES: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    **{f"{name}_token": with_token(name) for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")},
    "a named token of the model's own": with_named_token,
    "extra special tokens": lambda tokenizer: setattr(tokenizer, "extra_special_tokens", ["<|im_start|>"]),
    "an added token": lambda tokenizer: tokenizer.add_tokens("<new>"),
    "an added token's blanks": lambda tokenizer: tokenizer.add_tokens(
        AddedToken("<|im_start|>", lstrip=True, special=True), special_tokens=True
    ),
    "the chat template": lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
    "a named chat template": lambda tokenizer: setattr(
        tokenizer, "chat_template", {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    ),
    "add_bos_token": lambda tokenizer: setattr(tokenizer, "add_bos_token", True),
    "add_eos_token": lambda tokenizer: setattr(tokenizer, "add_eos_token", True),
    "add_prefix_space": lambda tokenizer: setattr(tokenizer, "add_prefix_space", True),
    "split_special_tokens": lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
    "clean_up_tokenization_spaces": lambda tokenizer: setattr(tokenizer, "clean_up_tokenization_spaces", True),
    "legacy": lambda tokenizer: setattr(tokenizer, "legacy", True),
    "fix_mistral_regex": lambda tokenizer: tokenizer.init_kwargs.update(fix_mistral_regex=True),
    "an attribute of a later version": lambda tokenizer: setattr(tokenizer, "of_a_later_version", {"key": (1, 2)}),
    "the class": with_class,
    "the normaliser": with_normaliser,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_makes_tokens_is_in_the_digest(change: Callable[[PreTrainedTokenizerFast], Any]) -> None:
    changed = tokenizer()
    change(changed)
    assert tokenizer_digest(changed) != tokenizer_digest(tokenizer())


def test_neither_place_nor_use_is_in_the_digest(tmp_path: Path) -> None:
    found = set()
    for name in ("one", "two"):
        save_tiny_llama(tokenizer(), tmp_path / name)
        loaded = load_tokenizer(ModelConfig(name=str(tmp_path / name)))
        found.add(tokenizer_digest(loaded))
        loaded("A text" * 9, padding="max_length", truncation=True, max_length=5)
        loaded.model_max_length, before = 3, loaded.model_max_length
        loaded("A text that is longer than this, which is warned about")
        loaded.model_max_length = before
        loaded.apply_chat_template([{"role": "user", "content": "A"}])
        found.add(tokenizer_digest(loaded))
    assert len(found) == 1


def test_code_that_comes_with_a_model_is_in_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    for number in (1, 1, 2):
        folder = tmp_path / f"place{len(found)}" / "transformers_modules"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "own_tokenizer.py").write_text(
            "from transformers import PreTrainedTokenizerFast\nfrom . import rules\n"
            "class OwnTokenizer(PreTrainedTokenizerFast): pass\n"
        )
        (folder / "rules.py").write_text(f"NUMBER = {number}\n")
        monkeypatch.syspath_prepend(str(folder.parent))
        for module in ("transformers_modules", "transformers_modules.own_tokenizer", "transformers_modules.rules"):
            monkeypatch.delitem(__import__("sys").modules, module, raising=False)
        own = __import__("transformers_modules.own_tokenizer", fromlist=["OwnTokenizer"]).OwnTokenizer
        changed = tokenizer()
        changed.__class__ = own
        found.append(tokenizer_digest(changed))
    assert found[0] == found[1] != found[2]


# The data section, files and code


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"Name {n}"}, {"role": "assistant", "content": "A"}], "by": n}
        for n in range(9)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def parts(rows: Path, **keys: Any) -> dict[str, Any]:
    data = DataConfig.model_validate({"name": str(rows), "num_eval": 2} | keys)
    return made_from(data, open_sources(data, tokenizer()), tokenizer())


OTHER_VALUES: dict[str, Any] = {
    "max_length": 99,
    "num_train": 3,
    "num_eval": 3,
    "num_test": 1,
    "loss_on": "all",
    "turns": "last",
    "on_bad_row": "skip",
    "shape": "messages",
}


def test_every_key_of_the_section_counts_unless_named(rows: Path) -> None:
    found = parts(rows)
    assert found.keys() >= set(DataConfig.model_fields) - DESCRIBED_OTHERWISE
    assert set(DataConfig.model_fields) >= DESCRIBED_OTHERWISE
    tested = {*OTHER_VALUES, "chat_template"}  # the template: in the next test
    assert set(DataConfig.model_fields) - DESCRIBED_OTHERWISE == tested, "give the new key another value in this test"
    for key, value in OTHER_VALUES.items():
        assert parts(rows, **{key: value}) != found, key


def test_keys_described_otherwise_count_by_their_rows(rows: Path, tmp_path: Path) -> None:
    found = parts(rows)
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n", encoding="utf-8")
    assert parts(other) != found
    assert parts(rows, group_by="by") != found
    assert parts(rows, eval_name=str(other)) != found
    assert parts(rows, num_test=1, test_name=str(other)) != parts(rows, num_test=1)
    moved = tmp_path / "moved.jsonl"
    shutil.copy(rows, moved)
    assert parts(moved) == found


def test_the_content_of_a_template_file_counts(rows: Path, tmp_path: Path) -> None:
    template, found = tmp_path / "own.jinja", []
    for text in ("A", "B"):
        template.write_text(f"{tokenizer().chat_template}{{# {text} #}}", encoding="utf-8")
        found.append(parts(rows, chat_template=str(template)))
    assert found[0]["files"].keys() == {"chat_template"}
    assert found[0] != found[1]


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "jinja2", "torch", "pandas"])
def test_versions_of_libraries_count(rows: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = parts(rows), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == package else version(name))
    assert parts(rows) != before


def test_a_changed_module_changes_the_key(tmp_path: Path, rows: Path) -> None:
    copied = tmp_path / "loragrid"
    for room in ROOMS:
        path = PACKAGE / room
        if path.is_dir():
            shutil.copytree(path, copied / room, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copied / room)
    before = code_digest(copied)
    assert before == code_digest(PACKAGE) == parts(rows)["code"]
    for module in ("data/boundary.py", "data/chats/tokenizer.py", "trials/skip_reasons.py", "formatting.py"):
        with (copied / module).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        assert code_digest(copied) != before, module
        before = code_digest(copied)
    (copied / "data" / "new_module.py").touch()
    assert code_digest(copied) != before


def test_the_code_digest_covers_all_that_makes_rows() -> None:
    seen, todo = set(), {"loragrid.data.dataset", "loragrid.models.loading"}
    while todo:
        module = todo.pop()
        seen.add(module)
        path = PACKAGE / Path(*module.split(".")[1:])
        source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("loragrid."):
                todo |= {str(node.module)} - seen
    rooms = {module.split(".")[1] for module in seen}
    assert rooms <= {room.removesuffix(".py") for room in ROOMS}


# What is loaded


def test_a_changed_start_token_trains_other_tokens(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))
    own = byte_level(bos="<s>", chat_template="{{ bos_token }}" + str(tokenizer().chat_template))
    save_tiny_llama(own, tmp_path / "model")
    model, config = ModelConfig(name=str(tmp_path / "model")), tmp_path / "model" / "tokenizer_config.json"
    data = DataConfig(name=str(rows), num_eval=2, max_length=128)
    first = load_data(data, model, load_tokenizer(model))
    config.write_text(re.sub(r'"bos_token": "<s>"', '"bos_token": "<|endoftext|>"', config.read_text()))
    second = load_data(data, model, load_tokenizer(model))
    assert first.train.input_ids[0, 0] == own.convert_tokens_to_ids("<s>")
    assert second.train.input_ids[0, 0] == own.convert_tokens_to_ids("<|endoftext|>")
    assert first.digest != second.digest


def test_parts_are_json_and_stay_the_same(rows: Path) -> None:
    assert json.loads(json.dumps(parts(rows))) == parts(rows) == copy.deepcopy(parts(rows))
    assert described.FORMAT_VERSION >= 5
