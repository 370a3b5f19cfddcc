"""Turns rows of text or chat into token ids, and marks the tokens that count in the loss."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loragrid.schema.errors import is_unicode
from loragrid.trials.skip_reasons import REWRITTEN, TOO_LONG, WITHOUT_LABELS, empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""The date that chat templates get as today's: the same rows must always become the same tokens."""

DATE_CODES = ("%d", "%m", "%b", "%B", "%y", "%Y", "%a", "%A", "%H", "%M", "%S", "%F")

HALF_CHARACTERS = "contains lone surrogates (such as \\ud800), which no tokenizer accepts"


@dataclass(frozen=True)
class LabelledTokens:
    """One row: its token ids, and the positions p whose next token input_ids[p + 1] is a label."""

    input_ids: tuple[int, ...]
    label_positions: tuple[int, ...]


class RowTokenizer:
    """Tokenizes rows of one kind; `columns`: canonical column -> the rows' own.

    messages: rendered with the tokenizer's chat template. Labels are the assistant's turns with their end tokens.
    prompt, completion: tokenized separately and joined, so generation starts from exactly the prompt's tokens. The end
    token is appended. Labels are the completion.
    text: the end token is appended. Labels are all tokens.
    With `loss_on="all"` all tokens are labels in every kind.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        columns: Mapping[str, str],
        *,
        max_length: int,
        loss_on: Literal["completion", "all"],
        title: str,
    ) -> None:
        self.tokenizer, self.columns, self.title = tokenizer, dict(columns), title
        self.max_length, self.loss_on = max_length, loss_on
        if not tokenizer.is_fast:
            raise ValueError(f"model.name: {tokenizer.name_or_path}: it has no fast tokenizer, which LoraGrid needs")
        if "messages" in columns and tokenizer.chat_template is None:
            raise ValueError(
                f"{title}: holds chat messages, but the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use an instruction-tuned model, or rows with prompt and completion"
            )
        self.chat_template = _dated(str(tokenizer.get_chat_template())) if "messages" in columns else None
        # Some tokenizers end every text with the end token; it must not stand between a prompt and its completion.
        end = tokenizer.eos_token_id
        self.ends_every_text = end is not None and tokenizer("a")["input_ids"][-1] == end

    def tokenize(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> list[LabelledTokens | str]:
        """Every row's tokens, or the reason why the row is skipped; `indices`: the rows' numbers, for error messages.

        Raises:
            ValueError: a value has a type that its column does not allow.
        """
        if "messages" in self.columns:
            tokenized = self._tokenize_messages(rows, indices)
        elif "text" in self.columns:
            tokenized = self._tokenize_texts(rows, indices)
        else:
            tokenized = self._tokenize_pairs(rows, indices)
        return [self._usable(row) if isinstance(row, LabelledTokens) else row for row in tokenized]

    def _usable(self, row: LabelledTokens) -> LabelledTokens | str:
        if len(row.input_ids) > self.max_length:
            return TOO_LONG
        if self.loss_on == "all":
            row = LabelledTokens(row.input_ids, tuple(range(len(row.input_ids) - 1)))
        return row if row.label_positions else WITHOUT_LABELS

    def _tokenize_texts(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> list[LabelledTokens | str]:
        texts = self._texts(rows, indices, "text")
        encoded = self.tokenizer([text or "" for text in texts])["input_ids"] if texts else []
        return [
            _labelled(self._ended(ids), 1) if text else empty("text") for text, ids in zip(texts, encoded, strict=True)
        ]

    def _tokenize_pairs(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> list[LabelledTokens | str]:
        prompts, completions = (self._texts(rows, indices, column) for column in ("prompt", "completion"))
        if not rows:
            return []
        heads = self.tokenizer([prompt or "" for prompt in prompts])["input_ids"]
        tails = self.tokenizer([text or "" for text in completions], add_special_tokens=False)["input_ids"]
        tokenized: list[LabelledTokens | str] = []
        for prompt, completion, head, tail in zip(prompts, completions, heads, tails, strict=True):
            if prompt is None or not completion:
                tokenized.append(empty("prompt" if prompt is None else "completion"))
            else:
                start = self._without_end(head)
                tokenized.append(_labelled([*start, *self._ended(tail)], len(start)))
        return tokenized

    def _tokenize_messages(
        self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int]
    ) -> list[LabelledTokens | str]:
        rendered = [self._render(row, index) for row, index in zip(rows, indices, strict=True)]
        texts = [conversation.text for conversation in rendered if isinstance(conversation, _Conversation)]
        if not texts:
            return [WITHOUT_LABELS if isinstance(row, _Conversation) else row for row in rendered]
        # The template has already written the special tokens.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        of_texts = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        tokenized: list[LabelledTokens | str] = []
        for conversation in rendered:
            if isinstance(conversation, str):
                tokenized.append(conversation)
                continue
            ids, offsets = next(of_texts)
            learnt = [
                position - 1
                for position, (start, end) in enumerate(offsets)
                if position
                and any(start < turn_end and end > turn_start for turn_start, turn_end in conversation.turns)
            ]
            tokenized.append(LabelledTokens(tuple(ids), tuple(learnt)))
        return tokenized

    def _render(self, row: Mapping[str, Any], index: int) -> "_Conversation | str":
        messages = self._messages(row.get(self.columns["messages"]), index)
        if not messages:
            return empty("messages")
        text = self._apply_template(messages, index, add_generation_prompt=False)
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or self.loss_on == "all":
                continue
            before = self._apply_template(messages[:number], index, add_generation_prompt=True) if number else ""
            last = number == len(messages) - 1
            until = text if last else self._apply_template(messages[: number + 1], index, add_generation_prompt=False)
            if not (text.startswith(until) and until.startswith(before)):
                return REWRITTEN
            # Text after the end token (often a newline) is no label, because it is never generated.
            ended = until.rstrip()
            end_token = self.tokenizer.eos_token
            turns.append((len(before), len(ended) if end_token and ended.endswith(str(end_token)) else len(until)))
        return _Conversation(text, tuple(turns))

    def _apply_template(self, messages: list[dict[str, Any]], index: int, *, add_generation_prompt: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program and can raise any exception
            raise ValueError(f"{self.title}: row {index + 1}: the chat template refuses it: {error}") from error
        if not is_unicode(str(rendered)):
            raise ValueError(f"{self.title}: row {index + 1}, column {self.columns['messages']}: {HALF_CHARACTERS}")
        return str(rendered)

    def _messages(self, value: object, index: int) -> list[dict[str, Any]]:
        wrong = f"{self.title}: row {index + 1}, column {self.columns['messages']}"
        if value is None:
            return []
        if not isinstance(value, list):
            raise ValueError(f"{wrong}: {_shown(value)}: not a list of messages")
        for message in value:
            if not (
                isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            ):
                raise ValueError(
                    f"{wrong}: {_shown(message)}: not a message, which has a role and a content, both text"
                )
        # Columnar files store null for keys that only other messages have, but templates test whether a key exists.
        return [{key: item for key, item in message.items() if item is not None} for message in value]

    def _texts(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int], canonical: str) -> list[str | None]:
        column = self.columns[canonical]
        texts = []
        for row, index in zip(rows, indices, strict=True):
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{self.title}: row {index + 1}, column {column}: {_shown(text)}: not text")
            if text is not None and not is_unicode(text):
                raise ValueError(f"{self.title}: row {index + 1}, column {column}: {HALF_CHARACTERS}")
            texts.append(text)
        return texts

    def _ended(self, ids: Sequence[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, int(end)]

    def _without_end(self, ids: Sequence[int]) -> Sequence[int]:
        return ids[:-1] if self.ends_every_text else ids


@dataclass(frozen=True)
class _Conversation:
    """A rendered chat; `turns`: the character ranges of the assistant's turns."""

    text: str
    turns: tuple[tuple[int, int], ...]


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of everything that turns rows into tokens: vocabulary, merges, special tokens and chat template."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Settings that earlier calls left behind; they do not affect LoraGrid's tokens.
    content.pop("truncation", None)
    content.pop("padding", None)
    described = {
        "tokenizer": content,
        "chat_template": tokenizer.chat_template,
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _dated(chat_template: str) -> str:
    """The template with a macro `strftime_now` of a fixed date; a template takes no functions as arguments."""
    if "strftime_now" not in chat_template:
        return chat_template
    filters = "".join(f" | replace('{code}', '{TEMPLATE_DATE.strftime(code)}')" for code in DATE_CODES)
    # The template must begin at the start of a line; the engine drops this newline from the output.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{chat_template}"


def _labelled(ids: Sequence[int], first: int) -> LabelledTokens:
    """A row whose labels are the tokens from index `first` on, without token 0, which nothing predicts."""
    return LabelledTokens(tuple(ids), tuple(range(max(first - 1, 0), len(ids) - 1)))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
