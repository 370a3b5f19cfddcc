"""Small tokenizers configured exactly as those of common model families, trained on a few lines."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tests.support.tiny_tokenizers import LETTERS, LINES, byte_level, metaspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def sentencepiece(scheme: str, **settings: Any) -> "PreTrainedTokenizerFast":
    """As `metaspace`, with bytes that are ordinary tokens, as SentencePiece has them."""
    from tokenizers import Tokenizer

    tokenizer = metaspace(scheme, **settings)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def llama_2(**settings: Any) -> "PreTrainedTokenizerFast":
    """BPE with bytes: the normaliser puts a blank before every stretch of text between special tokens."""
    from tokenizers import normalizers

    tokenizer = sentencepiece("never", **settings)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return tokenizer


def gemma(**settings: Any) -> "PreTrainedTokenizerFast":
    """BPE with bytes: blanks are replaced, and none is added."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    tokenizer = sentencepiece("never", **settings)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def gpt_2_with_prefix(**settings: Any) -> "PreTrainedTokenizerFast":
    """Byte-level BPE with `add_prefix_space`, as of RoBERTa: a blank before every text."""
    from tokenizers import pre_tokenizers

    tokenizer = byte_level(**settings)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def llama_3(**settings: Any) -> "PreTrainedTokenizerFast":
    """Byte-level BPE behind a regular expression that splits digits, with a start token before every text."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = byte_level(bos="<|begin_of_text|>", adds_bos=True, **settings)
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def t5(**settings: Any) -> "PreTrainedTokenizerFast":
    """Unigram with SentencePiece's blanks; every text gets a blank before it and the end token behind it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = [*LETTERS, *"()=+#:'\"<>/|\n"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    end = [("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=end
    )
    given = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given | settings)


def xlm_roberta(**settings: Any) -> "PreTrainedTokenizerFast":
    """Unigram as of T5, with a start and an end token around every text."""
    from tokenizers import processors

    tokenizer = t5(**{"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>"} | settings)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ids
    )
    return tokenizer


def bert(**settings: Any) -> "PreTrainedTokenizerFast":
    """WordPiece in lower case with [CLS] and [SEP] around every text, and no end token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=list(LETTERS), show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    given = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given | settings)


LOSSLESS: Mapping[str, Callable[[], "PreTrainedTokenizerFast"]] = {
    "gpt-2": byte_level,
    "gpt-2 with prefix": gpt_2_with_prefix,
    "llama-2": llama_2,
    "llama-3": llama_3,
    "mistral, always": lambda: sentencepiece("always"),
    "mistral, first": lambda: sentencepiece("first"),
    "mistral, never": lambda: sentencepiece("never"),
    "bytes marked as special": lambda: metaspace("first"),
    "gemma": gemma,
}
"""Family -> a tokenizer that keeps every character."""

LOSSY: Mapping[str, Callable[[], "PreTrainedTokenizerFast"]] = {"t5": t5, "xlm-roberta": xlm_roberta, "bert": bert}
"""Family -> a tokenizer that normalises text or lacks characters."""
