"""Splits tokenised rows into a prompt and a reference answer."""

from typing import TYPE_CHECKING

from loragrid.data.dataset import TokenizedData, TokenRows
from loragrid.data.labels import IGNORED
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

    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the tokenizer's end token, and the special tokens that references end with.

        Some chat templates end a turn with a token of their own.
        """
        special, end = set(self._tokenizer.all_special_ids), self._tokenizer.eos_token_id
        found = set() if end is None else {int(end)}
        for question in (question for questions in self.questions.values() for question in questions):
            found |= set([token for token in question.reference if token in special][-1:])
        return tuple(sorted(found))
