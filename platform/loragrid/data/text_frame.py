"""The tokens that a tokenizer puts before and after a text; each is there once, also if the text holds it itself."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loragrid.data.end_tokens import end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_BLANK_TOKENS = 16
"""So many tokens of white space may be before a start token, or behind an end token, that a text holds itself."""

PART = re.compile(r"\s*\S")
"""A character with the white space before it."""

BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class TextFrame:
    """The start tokens before a text and the end token behind it.

    start: what the tokenizer adds before a text, such as a start token or [CLS]. end: the tokenizer's end token; of a
    tokenizer without one, what it adds behind a text. ends: ids of all tokens that can end a text (`end_token_ids`).
    special: ids of all special tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None = None) -> None:
        self._backend = tokenizer.backend_tokenizer
        self.start, self._behind = _added_around(tokenizer)
        self.special = special_ids(tokenizer)
        eos = tokenizer.eos_token_id
        self.end = self._behind if eos is None else (int(eos),)
        self.ends = (end_token_ids(tokenizer, chat_template) - set(self.start)) | set(self.end)

    def own_start(self, ids: Sequence[int]) -> int:
        """Number of leading tokens that are the start tokens again, with white space before them; 0 if none are."""
        if not self.start or self.start[0] not in ids[: MOST_BLANK_TOKENS + 1]:
            return 0
        position = list(ids).index(self.start[0])
        if not self.is_blank(ids[:position]):
            return 0
        for expected in self.start:
            if position == len(ids) or ids[position] != expected:
                break
            position += 1
        return position

    def own_end(self, ids: Sequence[int]) -> int | None:
        """Number of tokens up to the end token that a text holds itself, behind which is only white space, or None."""
        for position in range(len(ids) - 1, max(len(ids) - MOST_BLANK_TOKENS - 2, -1), -1):
            if ids[position] in self.ends:
                return position + 1 if self.is_blank(ids[position + 1 :]) else None
        return None

    def framed(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a text with what the tokenizer adds around every text, and nothing twice."""
        behind = () if self.own_end(ids) is not None else self._behind
        return [*self.start, *ids[self.own_start(ids) :], *behind]

    def is_blank(self, ids: Sequence[int]) -> bool:
        """Whether tokens are white space only; many tokens never are."""
        if len(ids) > MOST_BLANK_TOKENS + 1:
            return False
        return not str(self._backend.decode(list(ids), skip_special_tokens=False)).strip()


def is_altered(text: str, decoded: str) -> bool:
    """Whether a tokenizer has changed a text, of which it keeps what its tokens decode to.

    A single blank more is no change anywhere, nor is one fewer at the beginning: many tokenizers write a blank before
    every stretch of text or around punctuation marks. Other, fewer or more characters are a change.
    """
    if decoded in (text, f" {text}", text.removeprefix(" ")):
        return False
    # Each character with the white space before it; the full stop stands for the end of the text.
    parts, found = PART.findall(f"{text}."), PART.findall(f"{decoded}.")
    if len(parts) != len(found):
        return True
    if found[0] == parts[0].removeprefix(" "):
        parts, found = parts[1:], found[1:]
    return any(kept not in (part, f" {part}") for part, kept in zip(parts, found, strict=True))


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The ids of all special tokens: the named ones, and the added tokens that are marked as special.

    Tokens of single bytes are none, although some tokenizers mark them: they spell characters without a token.
    """
    added = tokenizer.added_tokens_decoder
    marked = {number for number, token in added.items() if token.special}
    named = {int(number) for number in tokenizer.all_special_ids if number is not None}
    of_bytes = {number for number, token in added.items() if BYTE.fullmatch(token.content)}
    return frozenset((marked | named) - of_bytes)


def _added_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the tokenizer adds before and behind every text."""
    whole = tuple(tokenizer("a")["input_ids"])
    own = tuple(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return whole[:start], whole[start + len(own) :]
    raise ValueError(
        f"model.name: {tokenizer.name_or_path}: its tokenizer reads a text otherwise if it adds no special tokens, so "
        "that LoraGrid cannot tell what it adds"
    )
