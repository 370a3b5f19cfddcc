"""Tokenizers of the common kinds, trained on a few lines, and tiny models for them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LINES = [
    "Which river runs through the old town? The Elbe does, and slowly.",
    "user assistant system tool You are a helpful assistant that answers briefly.",
    "Name a colour. Blue is a colour. Count to five: one, two, three, four, five.",
    "question answer Q: A: The capital of the moon is unknown to me.",
    "def f(x): return x + 1  # code with spaces",
    "Grüße aus Köln, naïve café, 你好 世界 <think> </think>",
] * 20
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LETTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!"


def byte_level(*, bos: str | None = None, adds_bos: bool = False, **settings: Any) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer as of GPT-2, Llama 3 and Qwen, with ChatML's special tokens and template.

    adds_bos: whether every text gets the start token `bos`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += [bos] if bos and bos not in special else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    if adds_bos:
        assert bos is not None, "a start token is named"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    given = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": bos, "chat_template": CHATML}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given | settings)


def metaspace(scheme: str = "always", **settings: Any) -> "PreTrainedTokenizerFast":
    """A BPE tokenizer with SentencePiece's blanks as of Llama 2 and Mistral; `scheme`: always, first or never."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=756, special_tokens=special, initial_alphabet=list(LETTERS))
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given | settings)


def save_tiny_llama(tokenizer: "PreTrainedTokenizerFast", folder: Path, *, seed: int = 0, **config: Any) -> None:
    """Write a random Llama of two layers and the tokenizer into `folder`; config: keys of its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
