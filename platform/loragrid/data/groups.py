"""Finds the group of a row (rows of one group never stand in two splits) and the texts that splits may share."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loragrid.data.shapes.messages import text_of

NO_ANSWER_YET = ("system", "developer", "assistant")
"""Roles that ask nothing; an assistant's turn answers somebody only after a message of another role."""


@dataclass(frozen=True)
class RowTexts:
    """Digests of a row's texts, with which splits are compared; equal texts up to white space have equal digests.

    prompt: everything before the first answer; None for plain text. questions, answers: the texts of the turns, in
    their order; of plain text the text is the only answer.
    """

    prompt: int | None
    questions: tuple[int, ...]
    answers: tuple[int, ...]


def group_of(row: Mapping[str, Any], value: object = None) -> int:
    """The group of a canonical row, a signed number of 64 bits. It depends on nothing but the row.

    value: what the row has in the column that names groups; rows with an equal value are one group. Rows without a
    value are one group if their prompts are equal (of plain text: their texts; of a chat: everything before the first
    answer).
    """
    if value is None or value == "":
        return _prompt_of(row)
    return text_digest(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str))


def texts_of(row: Mapping[str, Any]) -> RowTexts:
    """The digests of a canonical row's texts."""
    if "messages" in row:
        spoken: dict[str, list[int]] = {"user": [], "assistant": []}
        for message in _messages(row["messages"]):
            said = _said(message)
            if message.get("role") in spoken and said.strip():
                spoken[message["role"]].append(text_digest(said))
        return RowTexts(_prompt_of(row), tuple(spoken["user"]), tuple(spoken["assistant"]))
    if "text" in row:
        return RowTexts(None, (), (text_digest(str(row["text"])),))
    prompt, completion = (text_digest(str(row.get(name))) for name in ("prompt", "completion"))
    return RowTexts(prompt, (prompt,), (completion,))


def text_digest(text: str) -> int:
    """A signed number of 64 bits that identifies a text up to white space."""
    content = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def _prompt_of(row: Mapping[str, Any]) -> int:
    if "messages" not in row:
        return text_digest(str(row.get("text" if "text" in row else "prompt")))
    opening = _before_first_answer(_messages(row["messages"]))
    if len(opening) == 1 and opening[0]["role"] == "user" and not row.get("tools"):
        # A chat that begins with a question, and a pair with this prompt, ask the same.
        return text_digest(opening[0]["said"])
    shown = [opening, row["tools"]] if row.get("tools") else opening
    return text_digest(json.dumps(shown, sort_keys=True, default=str, ensure_ascii=False))


def _before_first_answer(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Who said what before the first answer to somebody; all messages if there is none.

    Every answer of a chat is learnt, given what is before it. Two chats that share any of these beginnings also share
    the first of them. Keys that say nothing, such as ids and weights, make no difference.
    """
    asked = False
    opening: list[dict[str, str]] = []
    for message in messages:
        role = str(message.get("role"))
        if asked and role == "assistant":
            break
        asked = asked or role not in NO_ANSWER_YET
        opening.append({"role": role, "said": " ".join(_said(message).split())})
    return opening


def _said(message: Mapping[str, Any]) -> str:
    """The text of a message and its calls of tools."""
    calls = [
        call.get("function", call) if isinstance(call, Mapping) else call for call in message.get("tool_calls", ())
    ]
    said = text_of(message.get("content"))
    return said + json.dumps(calls, sort_keys=True, default=str, ensure_ascii=False) if calls else said


def _messages(value: object) -> list[dict[str, Any]]:
    """The messages of a chat; those that are none are left out, because the tokenizer refuses them with their place."""
    found = value if isinstance(value, list) else []
    # Columnar files store null for keys that only other messages have.
    return [
        {key: item for key, item in message.items() if item is not None}
        for message in found
        if isinstance(message, dict)
    ]
