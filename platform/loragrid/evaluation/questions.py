"""Splits tokenised rows into a prompt and a reference answer."""

from typing import TYPE_CHECKING

from loragrid.data.boundary import NUM_TAIL_TOKENS, Boundary
from loragrid.data.dataset import TokenizedData, TokenRows
from loragrid.data.labels import IGNORED
from loragrid.data.text_frame import TextFrame, special_ids
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
        self._boundary, self._start = Boundary(tokenizer), TextFrame(tokenizer).start
        self._special = special_ids(tokenizer) - {tokenizer.unk_token_id}
        self._completions: dict[object, list[tuple[int, ...]]] = {}
        self.questions: Mapping[str, Sequence[Question]] = {
            "eval": questions_of(data.evaluation),
            "test": questions_of(data.test),
        }

    def train_questions(self) -> list[Question]:
        """As `Rows`."""
        return questions_of(self._data.train)

    def text(self, tokens: "Sequence[int]") -> str:
        """As `Rows`."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def completions(self, question: Question, texts: "Sequence[str]") -> list[tuple[int, ...]]:
        """As `Rows`. Rows whose prompts and references end alike share the tokens."""
        own_label = self.text(question.reference).strip()
        body = list(question.reference)
        while body and body[-1] in self._special:
            body.pop()
        end = question.reference[len(body) :]
        added = len(self._start) if question.prompt[: len(self._start)] == self._start else 0
        prompt = question.prompt[added:]
        before, whole = self._boundary.decoded([prompt[-NUM_TAIL_TOKENS:], (*prompt[-NUM_TAIL_TOKENS:], *body)])
        own = whole.removeprefix(before) if whole.startswith(before) else self.text(body)
        key = (prompt[-NUM_TAIL_TOKENS:], tuple(body) if own.strip() != own_label else _blanks(own), end, tuple(texts))
        if key not in self._completions:
            self._completions[key] = [(*tokens, *end) for tokens in self._written(prompt, own, tuple(body), texts)]
        return [
            question.reference if text == own_label else tokens
            for text, tokens in zip(texts, self._completions[key], strict=True)
        ]

    def _written(
        self, prompt: tuple[int, ...], own: str, body: tuple[int, ...], texts: "Sequence[str]"
    ) -> list[tuple[int, ...]]:
        """The tokens of each text behind the prompt, with the blanks that the completion `own`, of tokens `body`, has.

        Where a tokenizer adds a blank of its own, such as behind a special token, that one is not written again.
        """
        before, behind = _blanks(own)
        tried = [
            self._boundary.continuations(prompt, [f"{blanks}{text}{behind}" for text in (own.strip(), *texts)])
            for blanks in dict.fromkeys((before, before[1:], ""))
        ]
        found = next((tokens for tokens in tried if tokens[0] == body), tried[0])
        alone = self._boundary.tokens(texts)
        return [other if tokens is None else tokens for tokens, other in zip(found[1:], alone, strict=True)]

    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the tokenizer's end token, and the special tokens that references end with.

        Some chat templates end a turn with a token of their own.
        """
        end = self._tokenizer.eos_token_id
        found = set() if end is None else {int(end)}
        for question in (question for questions in self.questions.values() for question in questions):
            found |= set([token for token in question.reference if token in self._special][-1:])
        return tuple(sorted(found))


def _blanks(text: str) -> tuple[str, str]:
    """The white space before and behind a text."""
    start = len(text) - len(text.lstrip())
    return text[:start], text[max(start, len(text.rstrip())) :]
