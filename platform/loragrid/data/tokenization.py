"""Turns canonical rows of prompt and completion, or of plain text, into labelled tokens."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow
from loragrid.data.boundary import Boundary, JoinedPair
from loragrid.data.chats.tokenizer import ChatTokenizer
from loragrid.data.labelled_tokens import LabelledTokens, Tokenized, TokenizesRows, Usable, usable
from loragrid.data.shapes.recognition import Shape
from loragrid.data.text_frame import TextFrame, is_altered
from loragrid.data.values import text_fault
from loragrid.trials.skip_reasons import empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowTokenizer:
    """Tokenizes the canonical rows of a source.

    messages: see `ChatTokenizer`.
    prompt, completion: the prompt by itself, so that generation starts from exactly its tokens; then the completion's
    tokens behind it (see `boundary`). The end token is appended. Labels are the completion.
    text: the end token is appended. Labels are all tokens.
    With `data.loss_on: all` all tokens are labels in every kind.
    A start or an end token that a text holds itself is not added again.

    Raises:
        ValueError: the tokenizer cannot tokenize rows of this kind; the message begins with `title`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", shape: Shape, data: DataConfig, *, title: str) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"model.name: {tokenizer.name_or_path}: it has no fast tokenizer, which LoraGrid needs")
        if dropout := getattr(tokenizer.backend_tokenizer.model, "dropout", None):
            what = f"its tokenizer cuts the same text otherwise at every call (dropout {dropout:g})"
            raise ValueError(f"model.name: {tokenizer.name_or_path}: {what}; allowed: dropout null in tokenizer.json")
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
    """Tokenizes plain text: the end token is appended, and all tokens but the very first are labels."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._boundary, self._framed = Boundary(tokenizer), FramedRow(tokenizer)

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokenized]:
        """As `TokenizesRows`."""
        faults = [text_fault(row.get("text")) for row in rows]
        texts = ["" if fault else row.get("text") or "" for row, fault in zip(rows, faults, strict=True)]
        ids = self._boundary.tokens(texts)
        tokenized: list[Tokenized] = []
        for text, fault, own, decoded in zip(texts, faults, ids, self._boundary.decoded(ids), strict=True):
            if fault:
                tokenized.append(BadRow(what=fault, column="text"))
            elif self._framed.says_nothing(text, own):
                tokenized.append(empty("text"))
            else:
                tokenized.append((self._framed(text, decoded, (), own),))
        return tokenized


class PairTokenizer:
    """Tokenizes a prompt, and the completion behind it; the completion and its end token are labels."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._boundary, self._framed = Boundary(tokenizer), FramedRow(tokenizer)

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokenized]:
        """As `TokenizesRows`."""
        pairs = [(row.get("prompt"), row.get("completion")) for row in rows]
        faults = [_pair_fault(prompt, completion) for prompt, completion in pairs]
        texts = [("", "") if fault else (p or "", c or "") for (p, c), fault in zip(pairs, faults, strict=True)]
        joined = self._boundary.join([prompt for prompt, _ in texts], [completion for _, completion in texts])
        return [
            fault or (empty("prompt") if prompt is None else self._row(text, pair))
            for (prompt, _), text, fault, pair in zip(pairs, texts, faults, joined, strict=True)
        ]

    def _row(self, text: tuple[str, str], pair: JoinedPair) -> Tokenized:
        if pair.completion is None:
            what = "no tokens of it continue the prompt's tokens, because the tokenizer reads both as one word"
            return BadRow(what=f"{what}; a blank or a line break between the two parts them", column="completion")
        if self._framed.says_nothing(text[1], pair.completion):
            return empty("completion")
        row = self._framed("".join(text), pair.decoded, pair.prompt, pair.completion)
        if not pair.prompt and not self._framed.adds_start:
            row = row.noted("first_token_not_learnt")
        return (row.noted("boundary_moved"),) if pair.moved else (row,)


class FramedRow:
    """Makes rows of tokens: start tokens, prompt, completion, end token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._frame = TextFrame(tokenizer)
        self._unknown, self._unknown_text = tokenizer.unk_token_id, str(tokenizer.unk_token)

    @property
    def adds_start(self) -> bool:
        """Whether a token is put before every row."""
        return bool(self._frame.start)

    def says_nothing(self, text: str, ids: tuple[int, ...]) -> bool:
        """Whether a text that would be learnt is nothing but white space and an end token of its own."""
        if not text.strip() or not ids:
            return True
        num_ended = self._frame.own_end(ids)
        return num_ended is not None and self._frame.is_blank(ids[: num_ended - 1])

    def __call__(self, text: str, decoded: str, prompt: tuple[int, ...], completion: tuple[int, ...]) -> LabelledTokens:
        """The row of a text, with what was noticed about it; the completion is its label.

        text: the whole text. decoded: what its tokens decode to. prompt, completion: tokens, without added ones.
        """
        notes = []
        num_started = self._frame.own_start((*prompt, *completion))
        if num_started:
            notes.append("start_not_doubled")
            completion = completion[max(0, num_started - len(prompt)) :]
            prompt = prompt[num_started:]
        num_ended = self._frame.own_end(completion)
        if num_ended is not None and self._frame.end:
            notes.append("end_not_doubled")
            body, end = completion[: num_ended - 1], completion[num_ended - 1 : num_ended]
        else:
            body, end = completion, self._frame.end
        inside = {*prompt, *body}
        if not inside.isdisjoint(self._frame.special - {self._unknown}):
            notes.append("special_tokens_read")
        if self._unknown in inside and self._unknown_text not in text:
            notes.append("unknown_characters")
        elif is_altered(text, decoded):
            notes.append("text_altered")
        start = (*self._frame.start, *prompt)
        ids = (*start, *body, *end)
        # Nothing predicts token 0.
        return LabelledTokens(ids, tuple(range(max(len(start) - 1, 0), len(ids) - 1)), tuple(notes))


def _pair_fault(prompt: object, completion: object) -> BadRow | None:
    for column, value in (("prompt", prompt), ("completion", completion)):
        if fault := text_fault(value):
            return BadRow(what=fault, column=column)
    return None
