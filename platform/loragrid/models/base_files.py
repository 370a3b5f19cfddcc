"""The files of a model folder beside its weights: which a complete folder needs, and what they say about a base."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loragrid.models.file_hash import remembered_sha256, remembered_tensor_sha256s

CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
TOKENIZER_CONFIG, TEMPLATES_FOLDER = "tokenizer_config.json", "additional_chat_templates"
WEIGHTS = "weights"
"""The name under which the digests list all weight files together."""

TENSORS = "tensors"
"""The name under which the digests list all tensors together, in whichever files they are."""

TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "*vocab.txt",
    "merges*.txt",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "*.spm",
    "*.jinja",
    "chat_template*.json",
    f"{TEMPLATES_FOLDER}/*.jinja",
    "*.py",
)
"""Patterns of the files that decide how text becomes tokens; a tokenizer's own code is among them."""

OTHER_FILES = (GENERATION_CONFIG, "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Patterns of the other files that a complete folder keeps: how to generate, images, and the terms of use."""

SMALL_FILES = (CONFIG, *TOKENIZER_FILES, *OTHER_FILES)
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt"})
VOLATILE_KEYS = frozenset({"transformers_version", "_name_or_path", "name_or_path"})
"""Keys that change whenever a library writes a file again; they do not tell files apart."""

DIGITS = 16
"""Digits of the digest of a single file, enough to tell two files apart."""


def companion_files(folder: Path) -> list[Path]:
    """The files of a model folder that belong to a complete copy beside weights and config, relative to it."""
    return sorted(set(_matching(folder, (*TOKENIZER_FILES, *OTHER_FILES))))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder that decide how text becomes tokens, relative to it."""
    return sorted(set(_matching(folder, TOKENIZER_FILES)))


def copy_companions(source: Path, target: Path, *, tokenizer_only: bool = False) -> None:
    """Copy tokenizer, templates, generation config, processors and terms of use byte by byte.

    Files are copied and not saved by the libraries, because these write another class, other defaults and no slow
    vocabulary. tokenizer_only: only what turns text into tokens.
    """
    for name in tokenizer_files(source) if tokenizer_only else companion_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def set_chat_template(folder: Path, template: str) -> None:
    """Make `template` the one that a folder's tokenizer uses, wherever the folder had its own."""
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / TEMPLATES_FOLDER, ignore_errors=True)
    settings = folder / TOKENIZER_CONFIG
    if settings.is_file():
        content = read_json(settings)
        if content.pop("chat_template", None) is not None:
            settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_digests(folder: Path) -> dict[str, str]:
    """Digests of what a base consists of: weight files, tensors, the config, and each tokenizer and other file.

    A JSON file is identified by its content, not by its layout. Shards of another size hold the same tensors.
    """
    weights, tensors = hashlib.sha256(), set[tuple[str, str]]()
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(remembered_tensor_sha256s(path).items())  # two tensors of one name both count
        weights.update(f"{path.name}:{remembered_sha256(path)}\n".encode())
    found = {WEIGHTS: weights.hexdigest()[:DIGITS], CONFIG: _digest(folder / CONFIG)}
    found[TENSORS] = hashlib.sha256(json.dumps(sorted(tensors)).encode()).hexdigest()[:DIGITS]
    terms = ("LICENSE", "NOTICE", "USE_POLICY")
    names = [name for name in companion_files(folder) if not name.name.startswith(terms)]
    return found | {name.as_posix(): _digest(folder / name) for name in names}


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ValueError: the file holds no JSON mapping.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON mapping")
    return content


def base_config(written: Mapping[str, Any], own: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config of an exported model: the base's `own` config with the type of the weights that were written.

    written: what transformers wrote. Training switches the key-value cache off in a loaded config, and transformers
    adds the defaults of its version, so the base's own file is kept. The written config is used without `use_cache` if
    there is no own file, or if its values are not those of the model that was written.
    """
    if own is None or not _agree(written, own):
        return _without_cache_switch(written, own)
    return _with_dtype(own, str(written.get("dtype") or written.get("torch_dtype")))


def _agree(written: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether the values that both configs hold are equal, apart from those that an export changes."""
    ignored = {"dtype", "torch_dtype", "use_cache", "architectures", *VOLATILE_KEYS}
    for key in written.keys() & own.keys() - ignored:
        ours, theirs = written[key], own[key]
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            if not _agree(ours, theirs):
                return False
        elif ours != theirs:
            return False
    return True


def _without_cache_switch(written: Mapping[str, Any], own: Mapping[str, Any] | None) -> dict[str, Any]:
    config = {key: value for key, value in written.items() if key != "use_cache"}
    if own is not None and own.get("use_cache") is not None:
        config["use_cache"] = own["use_cache"]
    return config


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with `dtype` wherever it names a type, also of its parts."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changed[key] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
                yield path.relative_to(folder)


def _digest(path: Path) -> str:
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            pass
        else:
            kept = {k: v for k, v in content.items() if k not in VOLATILE_KEYS} if type(content) is dict else content
            return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:DIGITS]
    return remembered_sha256(path)[:DIGITS]
