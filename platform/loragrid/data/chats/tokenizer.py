"""Tokenizes chats: exactly the assistant's part and its end is learnt, else the chat is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow
from loragrid.data.chats.ends import MessageEnds
from loragrid.data.chats.messages import Chat, read_chat, text_of
from loragrid.data.chats.roles import ChatRoles
from loragrid.data.chats.rows import LearntChat, learnt_chats
from loragrid.data.chats.template import ChatRefusedError, ChatTemplate, template_texts
from loragrid.data.chats.tokens import ChatTokens
from loragrid.data.chats.turns import TurnFinder
from loragrid.data.labelled_tokens import LabelledTokens, Tokenized
from loragrid.trials.skip_reasons import EMPTY_TURNS, REWRITTEN, WITHOUT_LABELS, empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTokenizer:
    """Renders chats with the chat template and labels what the assistant's turns teach (see `turns`).

    Rows with tools use the tokenizer's template `tool_use` if it has one and `data.chat_template` is null.

    Raises:
        ValueError: the tokenizer has no chat template, or not the one that `data.chat_template` names, or that one
            cannot be compiled.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, *, title: str) -> None:
        texts = template_texts(tokenizer, data.chat_template)
        if not texts:
            raise ValueError(
                f"{title}: holds chat messages, but the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use an instruction-tuned model, a template of your own (data.chat_template), or rows with prompt and "
                "completion"
            )
        if data.loss_on == "all" and data.turns not in ("auto", "all"):
            raise ValueError(
                f"data.turns: {data.turns}: with data.loss_on: all every token is learnt; allowed: auto, all"
            )
        self._data = data
        self._finders = {name: TurnFinder(ChatTemplate(tokenizer, text)) for name, text in texts.items()}
        self._roles = {name: ChatRoles(finder.template) for name, finder in self._finders.items()}
        self._ends = {name: MessageEnds(finder.template) for name, finder in self._finders.items()}
        for finder in self._finders.values() if data.chat_template else ():
            if fault := finder.template.syntax_error():
                raise ValueError(f"data.chat_template: {data.chat_template}: cannot be read: {fault}")
        self._tokens = {name: ChatTokens(tokenizer, finder.template) for name, finder in self._finders.items()}

    def tokenize(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokenized]:
        """As `TokenizesRows`."""
        names = ["tool_use" if row.get("tools") and "tool_use" in self._finders else "default" for row in rows]
        learnt = [self._learnt(row, name) for row, name in zip(rows, names, strict=True)]
        tokens = {}
        for name, own in self._tokens.items():
            chats = [
                chat
                for found, used in zip(learnt, names, strict=True)
                if used == name and isinstance(found, list)
                for chat in found
            ]
            tokens[name] = iter(own.tokenize(chats))
        return [
            _row([next(tokens[name]) for _ in found]) if isinstance(found, list) else found
            for found, name in zip(learnt, names, strict=True)
        ]

    def _learnt(self, row: Mapping[str, Any], name: str) -> list[LearntChat] | str | BadRow:
        finder = self._finders[name]
        try:
            chat = read_chat(row, self._roles[name])
            if chat is None:
                return empty("messages")
            chat = self._ends[name].without_doubled(chat)
            if self._data.loss_on == "all":
                return [_whole(finder, chat)]
            if not chat.learnt:
                return EMPTY_TURNS if chat.num_empty else WITHOUT_LABELS
            if any(finder.template.special_token.search(text_of(message.get("content"))) for message in chat.messages):
                chat = replace(chat, notes=(*chat.notes, "special_tokens_read"))
            return learnt_chats(finder, chat, self._data.turns) or REWRITTEN
        except ChatRefusedError as error:
            counted = " (message 1 is the row's column of system prompts)" if row.get("system_first") else ""
            return BadRow(what=f"{error}{counted if 'message ' in str(error) else ''}", column=error.column)


def _whole(finder: TurnFinder, chat: Chat) -> LearntChat:
    """The row of a chat of which every token is learnt."""
    if chat.excluded:
        raise ChatRefusedError(
            "a turn is excluded (weight: 0 or train: false), but data.loss_on: all learns every token"
        )
    messages = finder.formed(chat)
    text = finder.template.render(messages, chat.tools)
    notes = finder.check_rendered(messages, chat.tools)
    return LearntChat(text=text, spans=(), notes=(*chat.notes, *notes))


def _row(found: Sequence[LabelledTokens | ChatRefusedError]) -> tuple[LabelledTokens, ...] | BadRow:
    rows = []
    for row in found:
        if isinstance(row, ChatRefusedError):
            return BadRow(what=str(row), column=row.column)
        rows.append(row)
    return tuple(replace(row, notes=tuple(dict.fromkeys(row.notes))) for row in rows)
