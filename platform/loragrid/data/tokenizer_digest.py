"""Identifies everything of a tokenizer that turns rows into tokens."""

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of everything that turns rows into tokens: vocabulary, merges, special tokens and chat template."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Settings that earlier calls left behind; they do not affect LoraGrid's tokens.
    content.pop("truncation", None)
    content.pop("padding", None)
    described = {
        "tokenizer": content,
        "chat_template": tokenizer.chat_template,
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
