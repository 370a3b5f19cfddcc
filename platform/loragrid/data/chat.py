"""Turns canonical rows of chat messages into labelled tokens with a tokenizer's chat template."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow
from loragrid.data.labelled_tokens import LabelledTokens, Tokenized
from loragrid.data.values import HALF_CHARACTERS, shown
from loragrid.schema.errors import is_unicode
from loragrid.trials.skip_reasons import REWRITTEN, WITHOUT_LABELS, empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""The date that chat templates get as today's: the same rows must always become the same tokens."""

DATE_CODES = ("%d", "%m", "%b", "%B", "%y", "%Y", "%a", "%A", "%H", "%M", "%S", "%F")


class ChatTokenizer:
    """Renders chats with the chat template; labels are the assistant's turns with their end tokens.

    Raises:
        ValueError: the tokenizer has no chat template; the message begins with `title`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, *, title: str) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{title}: holds chat messages, but the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use an instruction-tuned model, or rows with prompt and completion"
            )
        self.tokenizer, self._data = tokenizer, data
        self.chat_template = _dated(str(tokenizer.get_chat_template()))

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokenized]:
        """As `TokenizesRows`."""
        rendered = [self._render(row) for row in rows]
        texts = [conversation.text for conversation in rendered if isinstance(conversation, _Conversation)]
        if not texts:
            return [WITHOUT_LABELS if isinstance(row, _Conversation) else row for row in rendered]
        # The template has already written the special tokens.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        of_texts = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        tokenized: list[Tokenized] = []
        for conversation in rendered:
            if not isinstance(conversation, _Conversation):
                tokenized.append(conversation)
                continue
            ids, offsets = next(of_texts)
            learnt = [
                position - 1
                for position, (start, end) in enumerate(offsets)
                if position
                and any(start < turn_end and end > turn_start for turn_start, turn_end in conversation.turns)
            ]
            tokenized.append((LabelledTokens(tuple(ids), tuple(learnt)),))
        return tokenized

    def _render(self, row: Mapping[str, Any]) -> "_Conversation | str | BadRow":
        messages = _messages(row.get("messages"))
        if isinstance(messages, BadRow):
            return messages
        if not messages:
            return empty("messages")
        try:
            return self._conversation(messages)
        except _TemplateError as error:
            return BadRow(what=str(error), column="messages")

    def _conversation(self, messages: list[dict[str, Any]]) -> "_Conversation | str":
        text = self._apply_template(messages, add_generation_prompt=False)
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or self._data.loss_on == "all":
                continue
            before = self._apply_template(messages[:number], add_generation_prompt=True) if number else ""
            last = number == len(messages) - 1
            until = text if last else self._apply_template(messages[: number + 1], add_generation_prompt=False)
            if not (text.startswith(until) and until.startswith(before)):
                return REWRITTEN
            # Text after the end token (often a newline) is no label, because it is never generated.
            ended = until.rstrip()
            end_token = self.tokenizer.eos_token
            turns.append((len(before), len(ended) if end_token and ended.endswith(str(end_token)) else len(until)))
        return _Conversation(text, tuple(turns))

    def _apply_template(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program and can raise any exception
            raise _TemplateError(f"the chat template refuses it: {error}") from error
        if not is_unicode(str(rendered)):
            raise _TemplateError(HALF_CHARACTERS)
        return str(rendered)


class _TemplateError(ValueError):
    """The template cannot render a row."""


@dataclass(frozen=True)
class _Conversation:
    """A rendered chat; `turns`: the character ranges of the assistant's turns."""

    text: str
    turns: tuple[tuple[int, int], ...]


def _messages(value: object) -> list[dict[str, Any]] | BadRow:
    if value is None:
        return []
    if not isinstance(value, list):
        return BadRow(what=f"{shown(value)}: not a list of messages", column="messages")
    for message in value:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            what = f"{shown(message)}: not a message, which has a role and a content, both text"
            return BadRow(what=what, column="messages")
    # Columnar files store null for keys that only other messages have, but templates test whether a key exists.
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _dated(chat_template: str) -> str:
    """The template with a macro `strftime_now` of a fixed date; a template takes no functions as arguments."""
    if "strftime_now" not in chat_template:
        return chat_template
    filters = "".join(f" | replace('{code}', '{TEMPLATE_DATE.strftime(code)}')" for code in DATE_CODES)
    # The template must begin at the start of a line; the engine drops this newline from the output.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{chat_template}"
