"""Takes the end token off a message's own text if the chat template writes it there anyway."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loragrid.data.chats.messages import Chat
from loragrid.data.chats.template import ANSWER, QUESTION, ChatRefusedError, ChatTemplate


class MessageEnds:
    """Knows which tokens a template writes directly behind the messages of each role."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._tokens: dict[str, frozenset[str]] = {}

    def without_doubled(self, chat: Chat) -> Chat:
        """The chat without end tokens that would be written twice; the note `end_not_doubled` tells of them."""
        messages = [self._ended_once(message) for message in chat.messages]
        if messages == chat.messages:
            return chat
        return replace(chat, messages=messages, notes=(*chat.notes, "end_not_doubled"))

    def _ended_once(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if message.get("tool_calls") or not content:
            return dict(message)
        if isinstance(content, list):
            parts: Sequence[Mapping[str, Any]] = content
            text = self._text(message["role"], parts[-1]["text"])
            return {**message, "content": [*parts[:-1], {**parts[-1], "text": text}]}
        return {**message, "content": self._text(message["role"], content)}

    def _text(self, role: str, text: str) -> str:
        shorter, token = text, self._template.token
        while True:
            tokens = [found for found in token.finditer(shorter) if found.end() == len(shorter.rstrip())]
            if not tokens or tokens[0].group() not in self._written(role):
                break
            shorter = shorter[: tokens[0].start()]
        return shorter if shorter.strip() else text  # a message that says nothing else stays as it is

    def _written(self, role: str) -> frozenset[str]:
        """The tokens that end a message of a role: at the end of a chat, and before a question."""
        if role not in self._tokens:
            template, found = self._template, set[str]()
            question, message = template.trial("user", QUESTION), template.trial(role, ANSWER)
            for before in ([], [question], [question, template.trial("assistant", QUESTION)]):
                last = self._behind([*before, message])
                if last:
                    # Only an assistant's message has all of them, such as an end of the answer and an end of the turn.
                    found |= set(last if role == "assistant" else last[:1]) | set(
                        self._behind([*before, message, question])[:1]
                    )
            self._tokens[role] = frozenset(found - {template.opening.opener})
        return self._tokens[role]

    def _behind(self, messages: Sequence[Mapping[str, Any]]) -> list[str]:
        """The tokens directly behind the trial message, up to where the next message begins."""
        template = self._template
        try:
            text = template.render(messages).rpartition(ANSWER)[2]
        except ChatRefusedError:
            return []
        run = re.match(rf"(?:\s*(?:{template.token.pattern}))*", text)
        tokens: list[str] = template.token.findall(run.group()) if run else []
        opener = template.opening.opener
        return tokens[: tokens.index(opener)] if opener in tokens else tokens
