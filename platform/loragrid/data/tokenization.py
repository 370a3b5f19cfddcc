"""Turns canonical rows of prompt and completion, or of plain text, into labelled tokens."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow
from loragrid.data.chat import ChatTokenizer
from loragrid.data.labelled_tokens import LabelledTokens, Tokenized, TokenizesRows, Usable, usable
from loragrid.data.shapes import Shape
from loragrid.data.values import text_fault
from loragrid.trials.skip_reasons import empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowTokenizer:
    """Tokenizes the canonical rows of a source.

    messages: see `ChatTokenizer`.
    prompt, completion: tokenized separately and joined, so generation starts from exactly the prompt's tokens. The end
    token is appended. Labels are the completion.
    text: the end token is appended. Labels are all tokens.
    With `data.loss_on: all` all tokens are labels in every kind.

    Raises:
        ValueError: the tokenizer cannot tokenize rows of this kind; the message begins with `title`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", shape: Shape, data: DataConfig, *, title: str) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"model.name: {tokenizer.name_or_path}: it has no fast tokenizer, which LoraGrid needs")
        self.shape, self._data = shape, data
        self._tokenizer: TokenizesRows
        if "messages" in shape.columns:
            self._tokenizer = ChatTokenizer(tokenizer, data, title=title)
        elif "text" in shape.columns:
            self._tokenizer = TextTokenizer(tokenizer)
        else:
            self._tokenizer = PairTokenizer(tokenizer)

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Usable]:
        """What becomes of each canonical row: rows of tokens, reasons why they are skipped, or why it is refused."""
        if not rows:
            return []
        tokenized = self._tokenizer.tokenize(rows)
        return [usable(row, max_length=self._data.max_length, loss_on=self._data.loss_on) for row in tokenized]


class TextTokenizer:
    """Tokenizes plain text: the end token is appended, and all tokens are labels."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer, self._ends = tokenizer, EndToken(tokenizer)

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokenized]:
        """As `TokenizesRows`."""
        faults = [text_fault(row.get("text")) for row in rows]
        texts = ["" if fault else row.get("text") or "" for row, fault in zip(rows, faults, strict=True)]
        tokenized: list[Tokenized] = []
        for text, fault, ids in zip(texts, faults, self.tokenizer(texts)["input_ids"], strict=True):
            if fault:
                tokenized.append(BadRow(what=fault, column="text"))
            else:
                tokenized.append((_labelled(self._ends.ended(ids), 1),) if text else empty("text"))
        return tokenized


class PairTokenizer:
    """Tokenizes prompt and completion separately and joins them; the completion and its end token are labels."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer, self._ends = tokenizer, EndToken(tokenizer)

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokenized]:
        """As `TokenizesRows`."""
        pairs = [(row.get("prompt"), row.get("completion")) for row in rows]
        faults = [_pair_fault(prompt, completion) for prompt, completion in pairs]
        texts = [("", "") if fault else (p or "", c or "") for (p, c), fault in zip(pairs, faults, strict=True)]
        heads = self.tokenizer([prompt for prompt, _ in texts])["input_ids"]
        tails = self.tokenizer([completion for _, completion in texts], add_special_tokens=False)["input_ids"]
        tokenized: list[Tokenized] = []
        for (prompt, completion), fault, head, tail in zip(pairs, faults, heads, tails, strict=True):
            if fault:
                tokenized.append(fault)
            elif prompt is None or not completion:
                tokenized.append(empty("prompt" if prompt is None else "completion"))
            else:
                start = self._ends.without(head)
                tokenized.append((_labelled([*start, *self._ends.ended(tail)], len(start)),))
        return tokenized


class EndToken:
    """The tokenizer's end token, which stands once at the end of a row, and not between prompt and completion."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.id = tokenizer.eos_token_id
        # Some tokenizers end every text with the end token.
        self.ends_every_text = self.id is not None and tokenizer("a")["input_ids"][-1] == self.id

    def ended(self, ids: Sequence[int]) -> list[int]:
        """The tokens with the end token at their end."""
        return list(ids) if self.id is None or (ids and ids[-1] == self.id) else [*ids, int(self.id)]

    def without(self, ids: Sequence[int]) -> Sequence[int]:
        """The tokens without an end token that the tokenizer added."""
        return ids[:-1] if self.ends_every_text else ids


def _pair_fault(prompt: object, completion: object) -> BadRow | None:
    for column, value in (("prompt", prompt), ("completion", completion)):
        if fault := text_fault(value):
            return BadRow(what=fault, column=column)
    return None


def _labelled(ids: Sequence[int], first: int) -> LabelledTokens:
    """A row whose labels are the tokens from index `first` on, without token 0, which nothing predicts."""
    return LabelledTokens(tuple(ids), tuple(range(max(first - 1, 0), len(ids) - 1)))
