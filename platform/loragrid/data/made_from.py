"""What the rows of an experiment depend on; rows are kept under its digest, and a resumed sweep compares it."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loragrid.config.experiment import DataConfig
from loragrid.config.local_path import local_path
from loragrid.data.deck import Source
from loragrid.data.tokenizer_digest import tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 5
"""Changes with the rule by which rows are split and turned into tokens, and with the format of the cache."""

PACKAGES = ("transformers", "tokenizers", "jinja2", "torch", "pandas", "pyarrow", "datasets", "sentencepiece", "regex")
"""Libraries that read rows, order them, render templates or cut tokens."""

ROOMS = ("data", "models", "trials", "config", "tasks", "schema", "formatting.py")
"""The room that turns rows into tokens, and all that it may import."""

DESCRIBED_OTHERWISE = frozenset(
    {
        # By the fingerprint of each source, its columns and its groups.
        *("name", "revision", "subset", "split", "eval_name", "eval_split", "test_name", "test_split"),
        *("columns", "group_by"),
        # Held-out text is read and tokenized at every call.
        *("forgetting_name", "num_forgetting"),
    }
)
"""Keys of `data` whose values are no part of the digest. Every other key is one, also a new one."""


def made_from(data: DataConfig, sources: Mapping[str, Source], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Everything that the rows depend on, in words that an error message can name.

    A key that names a local file (such as a chat template) counts with the file's content.
    """
    settings = data.model_dump(mode="json", exclude=set(DESCRIBED_OTHERWISE))
    return {
        "format": FORMAT_VERSION,
        "code": code_digest(Path(__file__).parents[1]),
        "versions": {"python": platform.python_version()} | _versions(),
        "sources": {split: source.rows.fingerprint for split, source in sources.items()},
        "shapes": {split: source.shape.described for split, source in sources.items()},
        "read_as": {split: Path(source.rows.name).suffix for split, source in sources.items()},
        "columns": {split: _plain(source.shape) for split, source in sources.items()},
        "group_by": {split: source.group_by for split, source in sources.items()},
        "tokenizer": tokenizer_digest(tokenizer),
        **settings,
        "files": {key: digest for key, value in settings.items() if (digest := _file_digest(value))},
    }


def code_digest(package: Path) -> str:
    """A digest of LoraGrid's own modules that turn rows into tokens; `package` is the folder of `loragrid`."""
    digest = hashlib.sha256()
    for room in ROOMS:
        modules = [package / room] if room.endswith(".py") else sorted((package / room).rglob("*.py"))
        for module in modules:
            if module.is_file():
                digest.update(f"{module.relative_to(package)}\n".encode() + module.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in ("loragrid", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _file_digest(value: object) -> str | None:
    """The digest of the content of the file that a key's value names; None if it names none."""
    if not isinstance(value, str):
        return None
    try:
        return hashlib.sha256(local_path("data", value).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """A shape of rows as JSON can hold it: all that its fields say, apart from columns that are not used."""
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value) if part.name != "unused"}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return (
        value
        if value is None or isinstance(value, (bool, int, float, str))
        else getattr(value, "__qualname__", type(value).__qualname__)
    )
