"""Identifies everything of a tokenizer that turns rows into tokens."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_EFFECT = frozenset(
    {
        # Where the tokenizer was loaded from: the same files in another folder make the same tokens.
        "name_or_path",
        "files_loaded",
        "is_local",
        "_is_local",
        "local_files_only",
        "cache_dir",
        "token",
        "revision",
        "_commit_hash",
        "init_inputs",
        # What earlier calls left behind.
        "deprecation_warnings",
        "_in_target_context_manager",
        "verbose",
        # Described by its content.
        "_tokenizer",
    }
)
"""Attributes that change no token. Every other attribute is part of the digest, also those of later versions."""


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of everything that turns rows into tokens.

    It covers the vocabulary and the rules of the fast tokenizer, the class with its source if it is not a part of
    transformers, and all attributes except `NO_EFFECT`: special tokens of every name, chat templates, and switches.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Settings that earlier calls left behind; they do not affect LoraGrid's tokens.
    content.pop("truncation", None)
    content.pop("padding", None)
    described = {
        "tokenizer": content,
        "classes": [_class(kind) for kind in type(tokenizer).__mro__],
        "special tokens": dict(tokenizer.special_tokens_map),
        "attributes": _without_places(vars(tokenizer)),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _without_places(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that can change tokens; those of its initialisation repeat the same names."""
    return {
        str(key): _without_places(value) if key == "init_kwargs" else _plain(value)
        for key, value in attributes.items()
        if key not in NO_EFFECT and not str(key).endswith("_file")
    }


def _plain(value: object) -> Any:
    """The value as JSON can hold it, the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(item)] for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=json.dumps)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, type):
        return _class(value)
    # Such as an added token, which names all that it is; but never an address in memory.
    return [type(value).__qualname__, re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))]


def _class(kind: type) -> list[str]:
    """The class's name; of one that is part of neither transformers nor Python, with a digest of its source."""
    package = kind.__module__.partition(".")[0]
    if package == "transformers" or package in sys.stdlib_module_names:
        return [f"{kind.__module__}.{kind.__qualname__}"]
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:
        return [f"{kind.__module__}.{kind.__qualname__}"]
    # Code that comes with a model has a folder of its own, whose name depends on where the model was loaded from.
    sources = sorted(Path(file).parent.glob("*.py")) if package == "transformers_modules" else [Path(file)]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\n".encode() + source.read_bytes())
    return [kind.__qualname__, digest.hexdigest()]
