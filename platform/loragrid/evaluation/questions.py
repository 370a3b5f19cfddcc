"""Splits tokenised rows into a prompt and a reference answer."""

from typing import TYPE_CHECKING

from loragrid.data.boundary import NUM_TAIL_TOKENS, Boundary
from loragrid.data.dataset import TokenizedData, TokenRows
from loragrid.data.labels import IGNORED
from loragrid.data.text_frame import TextFrame
from loragrid.tasks.contract import Question

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase


def questions_of(rows: TokenRows) -> list[Question]:
    """The rows' questions. The answer is the last unbroken run of labels; in a chat, the assistant's last turn."""
    questions = []
    for key, ids, positions, targets, num_tokens in zip(
        rows.digests(), rows.input_ids, rows.label_positions, rows.label_targets, rows.num_tokens.tolist(), strict=True
    ):
        tokens = ids.tolist()
        learnt = positions[targets != IGNORED].tolist()
        first = len(learnt) - 1
        while first > 0 and learnt[first - 1] == learnt[first] - 1:
            first -= 1
        start, end = learnt[first] + 1, min(learnt[-1] + 2, num_tokens)
        questions.append(Question(key=key, prompt=tuple(tokens[:start]), reference=tuple(tokens[start:end])))
    return questions


class TokenizedQuestions:
    """The rows of an experiment as questions: the `Rows` of a task kind."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: TokenizedData) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._boundary, self._frame = Boundary(tokenizer), TextFrame(tokenizer, data.chat_template)
        (self._word,) = self._boundary.tokens(["a"])
        self._completions: dict[object, list[tuple[int, ...] | ValueError]] = {}
        self.questions: Mapping[str, Sequence[Question]] = {
            "eval": questions_of(data.evaluation),
            "test": questions_of(data.test),
        }

    def train_questions(self) -> list[Question]:
        """As `Rows`."""
        return questions_of(self._data.train)

    def text(self, tokens: "Sequence[int]") -> str:
        """As `Rows`."""
        body, _ = self._parted(tokens)
        body = body[self._frame.own_start(body) :]
        text = self._decoded(body)
        # Decoders mark the first token of a text that continues a word (WordPiece: ##s); behind a word they do not.
        word, whole = self._decoded(self._word), self._decoded((*self._word, *body))
        behind = whole.removeprefix(word)
        return behind if whole.startswith(word) and behind.strip() != text.strip() else text

    def _decoded(self, tokens: "Sequence[int]") -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _parted(self, tokens: "Sequence[int]") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of a text, and the end tokens behind them."""
        length = len(tokens)
        while length and tokens[length - 1] in self._frame.ends:
            length -= 1
        return tuple(tokens[:length]), tuple(tokens[length:])

    def completions(self, question: Question, texts: "Sequence[str]") -> list[tuple[int, ...]]:
        """As `Rows`. Rows with the same end of a prompt and the same reference share the tokens.

        Raises:
            ValueError: training would make other tokens of a text, none, or the unknown token.
        """
        own_label = self.text(question.reference).strip()
        body, end = self._parted(question.reference)
        start = self._frame.start
        added = len(start) if question.prompt[: len(start)] == start else 0
        prompt = question.prompt[added:]
        before, whole = self._boundary.decoded([prompt[-NUM_TAIL_TOKENS:], (*prompt[-NUM_TAIL_TOKENS:], *body)])
        own = whole.removeprefix(before) if whole.startswith(before) else self.text(body)
        key = (prompt[-NUM_TAIL_TOKENS:], body, end, tuple(texts))
        if key not in self._completions:
            self._completions[key] = self._written(prompt, own, body, texts)
        found = []
        for text, tokens in zip(texts, self._completions[key], strict=True):
            if text == own_label:
                found.append(question.reference)
            elif isinstance(tokens, ValueError):
                raise tokens
            else:
                found.append((*tokens, *end))
        return found

    def _written(
        self, prompt: tuple[int, ...], own: str, body: tuple[int, ...], texts: "Sequence[str]"
    ) -> list[tuple[int, ...] | ValueError]:
        """The tokens of each text behind the prompt, with the blanks that the completion `own`, of tokens `body`, has.

        Where a tokenizer adds a blank of its own, such as behind a special token, that one is not written
        again. An error stands for a text of which training would make other tokens, none, or the unknown token.
        """
        before, behind = _blanks(own)
        tried = [
            self._boundary.continuations(prompt, [f"{blanks}{text}{behind}" for text in (own.strip(), *texts)])
            for blanks in dict.fromkeys((before, before[1:], "", " "))
        ]
        fitting = [tokens for tokens in tried if tokens[0] == body] or tried[:1]
        found: list[tuple[int, ...] | ValueError] = []
        alone = self._boundary.tokens(texts)
        for text, own_tokens, *others in zip(texts, alone, *(tokens[1:] for tokens in fitting), strict=True):
            asked = f"behind the prompt ...{self.text(prompt[-NUM_TAIL_TOKENS:])[-30:]!r}"
            if self._tokenizer.unk_token_id in own_tokens:
                what = "the tokenizer has only its unknown token for some of its characters"
                found.append(_unwritten(text, what, "labels of characters that the tokenizer knows"))
            elif others[0] is None:
                what = f"{asked} the tokenizer has no tokens that continue the prompt with it"
                found.append(_unwritten(text, what, "completions that begin with a blank or a line break"))
            elif len(set(others)) > 1:
                what = f"{asked} its tokens depend on a blank that those of the row's completion {own!r} do not show"
                found.append(_unwritten(text, what, "prompts that end with a punctuation mark"))
            else:
                found.append(others[0])
        return found

    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the tokenizer's end token, and the end tokens that references end with.

        Some chat templates end a turn with a token of their own.
        """
        end = self._tokenizer.eos_token_id
        found = set() if end is None else {int(end)}
        for question in (question for questions in self.questions.values() for question in questions):
            found |= set(question.reference[-1:]) & self._frame.ends
        return tuple(sorted(found))


def _unwritten(label: str, what: str, allowed: str) -> ValueError:
    return ValueError(f"task.labels: {label!r}: {what}; allowed: {allowed}")


def _blanks(text: str) -> tuple[str, str]:
    """The white space before and behind a text."""
    start = len(text) - len(text.lstrip())
    return text[:start], text[max(start, len(text.rstrip())) :]
