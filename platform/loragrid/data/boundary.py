"""Cuts a completion into the tokens that continue a prompt's own tokens.

The prompt is tokenized by itself, because an answer is generated from exactly these tokens. A completion that is
tokenized by itself is wrong: many tokenizers put a blank before every text. The rule, for training, likelihoods and
generation alike:

1. If the tokens of prompt + completion begin with the prompt's tokens, the rest is the completion.
2. Otherwise the tokenizer would cut the joint text across the boundary. Then the completion's tokens are those of its
   text by itself, or (if these would add a blank or a word's beginning) those that it has behind another character.
   They are accepted only if prompt and completion together decode to what the joint text decodes to.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", ".", "a", "0", "=", "A", "字", "|", "\t", '"')
"""Characters that are tried, in this order, before a completion; their tokens are removed again."""

NUM_TAIL_TOKENS = 32
NUM_EQUAL_TOKENS = 8


@dataclass(frozen=True)
class JoinedPair:
    """A prompt's own tokens and those of its completion, without tokens that the tokenizer adds.

    completion: None if no tokens continue the prompt's. moved: whether the joint text would be cut into other tokens.
    decoded: what the joint text decodes to.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...] | None
    moved: bool
    decoded: str


class Boundary:
    """Joins prompts and completions by the rule above."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._anchors = dict(zip(ANCHORS, self.tokens(ANCHORS), strict=True))

    def tokens(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each text, without any that the tokenizer adds."""
        if not texts:
            return []
        found = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [tuple(ids) for ids in found]

    def decoded(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of tokens, with special tokens, as the tokenizer decodes it."""
        backend = self._tokenizer.backend_tokenizer
        return list(backend.decode_batch([list(ids) for ids in rows], skip_special_tokens=False))

    def join(self, prompts: Sequence[str], completions: Sequence[str]) -> list[JoinedPair]:
        """The tokens of each prompt and of the completion that follows it."""
        heads = self.tokens(prompts)
        wholes = self.tokens([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
        texts = self.decoded(wholes)
        tails: list[tuple[int, ...] | None] = [
            whole[len(head) :] if whole[: len(head)] == head else None
            for head, whole in zip(heads, wholes, strict=True)
        ]
        moved = [number for number, tail in enumerate(tails) if tail is None]
        found = self._continuations(
            [heads[number] for number in moved],
            [completions[number] for number in moved],
            [texts[number] for number in moved],
        )
        for number, tail in zip(moved, found, strict=True):
            tails[number] = tail
        is_moved = set(moved)
        return [
            JoinedPair(head, tail, number in is_moved, text)
            for number, (head, tail, text) in enumerate(zip(heads, tails, texts, strict=True))
        ]

    def continuations(self, prompt: Sequence[int], completions: Sequence[str]) -> list[tuple[int, ...] | None]:
        """The tokens of each completion behind the tokens of a prompt, as `join` cuts them behind the prompt's text.

        Of the prompt's text the end suffices: no tokenizer cuts a text otherwise for what is many tokens before.
        """
        end = tuple(prompt[-NUM_TAIL_TOKENS:])
        for tail in (end, tuple(prompt)):
            (text,) = self.decoded([tail])
            (again,) = self.tokens([text])
            if again[-NUM_EQUAL_TOKENS:] == tail[-NUM_EQUAL_TOKENS:]:
                return [pair.completion for pair in self.join([text] * len(completions), completions)]
        # The prompt's text is not known exactly: the text that must follow it is.
        (text,) = self.decoded([end])
        wanted = [text + completion for completion in completions]
        return self._continuations([end] * len(completions), completions, wanted)

    def _continuations(
        self, heads: Sequence[tuple[int, ...]], completions: Sequence[str], wanted: Sequence[str]
    ) -> list[tuple[int, ...] | None]:
        """The first tokens of each completion that, behind its prompt's tokens `heads`, decode to the wanted text."""
        found: list[tuple[int, ...] | None] = [None] * len(heads)
        for anchor, removed in {"": (), **self._anchors}.items():
            missing = [number for number, tail in enumerate(found) if tail is None]
            if not missing:
                break
            wholes = self.tokens([anchor + completions[number] for number in missing])
            tried = {
                number: whole[len(removed) :]
                for number, whole in zip(missing, wholes, strict=True)
                if whole[: len(removed)] == removed
            }
            texts = self.decoded([heads[number] + tail for number, tail in tried.items()])
            for (number, tail), text in zip(tried.items(), texts, strict=True):
                # A tokenizer can compose characters that a boundary parts.
                if unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", wanted[number]):
                    found[number] = tail
        return found
