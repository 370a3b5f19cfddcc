"""Finds where an answer begins if its chat template renders the messages before it unlike the prompt of generation."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loragrid.data.chats.template import (
    OTHER_TEMPLATE,
    ChatRefusedError,
    ChatTemplate,
    Messages,
    Tools,
    common_prefix,
)

HERE = "Zw7here7wZ"
MARK = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]|[◁][^◁▷\s]+[▷]")
"""A mark in a rendered chat, such as <think>, <|channel>, or [THINK]."""


def answer_start(text: str, first: int, prompt: str, messages: Messages, tools: Tools, template: ChatTemplate) -> int:
    """Where in `text` the answer begins that follows `prompt`; see the note `prompt_apart`.

    text: the rendered chat, in which the answer's first own text begins at `first` and whose messages up to the answer
    are `messages`. What stands between the last message before the answer and the answer must begin as the prompt ends;
    a block that the prompt opens and closes itself may be missing.

    Raises:
        ChatRefusedError: the prompt does not lead to this answer.
    """
    # A marker behind the last message shows where it ends; its own text can stand anywhere in the chat.
    copies = [*messages[:-2], _marked(messages[-2]), messages[-1]]
    marked, asked = template.render(copies, tools), template.prompt(copies[:-1], tools)
    if marked.count(HERE) == 1 and asked.count(HERE) == 1:
        lead = marked.partition(HERE)[2]
        opening = asked.partition(HERE)[2]
        num_behind = len(text) - first
        if lead.endswith(text[first:]) and prompt.endswith(opening):
            lead = lead[: len(lead) - num_behind]
            shared = len(common_prefix(lead, opening))
            more, other = opening[shared:], lead[shared:]
            if not more or (not other and is_closed(more)):
                return first - len(lead) + shared
            raise ChatRefusedError(_reason(opening, lead, shared), is_of_prompt=True)
    raise ChatRefusedError(
        "the chat template renders the messages before the answer differently when it is followed by the answer; "
        f"{OTHER_TEMPLATE}",
        is_of_prompt=True,
    )


def is_closed(text: str) -> bool:
    """Whether a text is one block that it opens and closes itself, such as an empty <think> </think>."""
    marks = MARK.findall(text.strip())
    return (
        len(marks) == 2
        and text.strip().startswith(marks[0])
        and text.strip().endswith(marks[1])
        and marks[0] != marks[1]
        and _name(marks[0]) == _name(marks[1])
    )


def _name(mark: str) -> str:
    """What a mark is about, for an opening and a closing one alike."""
    words = re.findall(r"[^\W_]+", mark.lower())
    return " ".join(word for word in words if word not in ("start", "begin", "end"))


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and content:
        parts: Sequence[Mapping[str, Any]] = content
        return {**message, "content": [*parts[:-1], {**parts[-1], "text": f"{parts[-1]['text']}{HERE}"}]}
    return {**message, "content": f"{content}{HERE}"} if isinstance(content, str) and content else dict(message)


def _reason(opening: str, lead: str, shared: int) -> str:
    """Why a prompt that ends with `opening` does not lead to an answer with `lead` before it."""
    # From the last mark on: a reader knows <think>, not the line break behind it.
    begin = max((found.start() for found in MARK.finditer(opening) if found.start() <= shared), default=shared)
    more = opening[begin:]
    if not opening[shared:].strip():
        return (
            f"the chat template's generation prompt ends with {more!r}, but the rendered answer goes on with "
            f"{lead[begin:]!r}: the model would learn to answer another prompt than it gets; {OTHER_TEMPLATE}"
        )
    return (
        f"the chat template's generation prompt ends with {opening[shared:]!r}, which the rendered answer lacks: the "
        "model would learn to answer another prompt than it gets; give every answer this part (such as its "
        f"reasoning), or {OTHER_TEMPLATE}"
    )
