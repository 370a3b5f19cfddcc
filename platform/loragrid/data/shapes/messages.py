"""Turns the chats of public data sets into messages as OpenAI writes them: roles, ShareGPT's names, older calls."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loragrid.data.bad_rows import BadRow
from loragrid.data.files.strict_json import parse_json
from loragrid.data.values import shown

TOOL_ROLES = ("observation", "function_response", "tool_response", "ipython")
"""Other names for the role tool. Some chat templates have them, so that only `ChatTokenizer` renames them."""
ROLES: dict[str, tuple[str, ...]] = {
    "system": (),
    "developer": (),
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bot", "chatbot", "bard", "bing", "model", "ai"),
    "tool": (),
    "function": (),
    **dict.fromkeys(TOOL_ROLES, ()),
}
"""Role -> other names for it in public data sets; upper and lower case are the same. Other roles stay as they are: the
tokenizer knows whether the chat template has them."""
CALLS = ("function_call", "tool_call")
"""Roles of a message whose text is the assistant's call of a tool, as JSON."""

_ROLE_OF = {name: role for role, others in ROLES.items() for name in (role, *others)}
LEARNING_KEYS = ("loss_weight", "mask", "masked", "loss_mask", "train_on_turn", "trainable")
"""Keys of other tools that say what is learnt; `ChatTokenizer` reads others, such as weight and train."""
_MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos", "file", "files")


def messages_of(value: object, column: str) -> list[dict[str, Any]] | BadRow | None:
    """A column's value as messages; None without a value. column: its name in the source, for a `BadRow`.

    A value is a list of messages, JSON of such a list, or one list for each key of the messages.
    """
    found = listed(value)
    if isinstance(found, BadRow):
        return BadRow(what=found.what, column=column)
    if found is None:
        return None
    if not isinstance(found, list):
        return BadRow(what=f"{shown(found)}: not a list of messages", column=column)
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(found, 1):
        normal = _message(message)
        if isinstance(normal, str):
            return BadRow(what=f"message {number}: {normal}", column=column)
        messages.append(normal)
    return messages


def listed(value: object) -> object | BadRow:
    """The value with JSON of a list read, and with lists by key as one list of objects; other values unchanged."""
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return None
        if not text.startswith(("[", "{")):
            return value
        try:
            return listed(parse_json(text))
        except ValueError as error:
            python = "; it is Python, not JSON: write it with json.dumps" if "'" in text[:20] else ""
            return BadRow(what=f"{shown(value)}: not JSON: {error}{python}")
    if isinstance(value, Mapping) and value and all(isinstance(items, list) for items in value.values()):
        lengths = {len(items) for items in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value


def holds_messages(value: object) -> bool:
    """Whether a value is a list of messages: of objects that have a role, under one of its two names."""
    found = listed(value)
    return isinstance(found, list) and bool(found) and all(_has_role(message) for message in found)


def is_role(name: str) -> bool:
    """Whether a text is a role of a message, under any of its names."""
    return name.strip().lower() in (*_ROLE_OF, *CALLS)


def is_share_gpt(value: object) -> bool:
    """Whether a value is a list of messages with the keys `from` and `value`."""
    found = listed(value)
    return isinstance(found, list) and any(isinstance(m, Mapping) and m.get("from") is not None for m in found)


def with_system(messages: list[dict[str, Any]], text: object, column: str) -> list[dict[str, Any]] | BadRow:
    """The messages after a system message with the text of a column of its own; unchanged without a text."""
    if text is None or text == "":
        return messages
    if not isinstance(text, str):
        return BadRow(what=f"{shown(text)}: not text", column=column)
    if messages and messages[0]["role"] in ("system", "developer"):
        if messages[0].get("content") == text:
            return messages
        return BadRow(what="a system prompt, but the messages begin with another one; keep one", column=column)
    return [{"role": "system", "content": text}, *messages]


def tools_of(value: object, column: str) -> list[Any] | BadRow | None:
    """The value of a column of tools as a list; None without tools."""
    found = listed(value)
    if isinstance(found, BadRow):
        return BadRow(what=found.what, column=column)
    if isinstance(found, Mapping):
        found = [found]
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        return BadRow(what=f"{shown(value)}: not a list of tools, each an object", column=column)
    return found


def _has_role(message: object) -> bool:
    return isinstance(message, Mapping) and (message.get("role") is not None or message.get("from") is not None)


def _message(message: object) -> dict[str, Any] | str:
    """The message with OpenAI's names, or what is wrong with it."""
    if not isinstance(message, Mapping) or not _has_role(message):
        return f"{shown(message)}: not a message, which has a role and a content (or from and value)"
    # A key with null is no key: templates test whether a key exists.
    found = {key: value for key, value in message.items() if value is not None}
    for ours, theirs in (("role", "from"), ("content", "value")):
        if theirs in found and (ours == "role" or "from" in message):
            if ours in found and found[ours] != found[theirs]:
                return f"has {ours} {shown(found[ours])} and {theirs} {shown(found[theirs])}; keep one"
            found[ours] = found.pop(theirs)
    for key in (*LEARNING_KEYS, *_MEDIA_KEYS):
        if found.get(key) not in (None, [], "", {}):
            return _refused_key(key)
    if not isinstance(found["role"], str):
        return f"role {shown(found['role'])}: not text"
    name = found["role"].strip().lower()
    if name in CALLS:
        return _call(found)
    found["role"] = _ROLE_OF.get(name, found["role"])
    older = found.pop("function_call", None)
    if older:
        if "tool_calls" in found or not isinstance(older, Mapping):
            return f"function_call {shown(older)}: not an object, or beside tool_calls; write tool_calls"
        found["tool_calls"] = [{"type": "function", "function": dict(older)}]
    if isinstance(found.get("tool_calls"), str):
        calls = listed(found["tool_calls"])
        if not isinstance(calls, list):
            return f"tool_calls {shown(found['tool_calls'])}: not a list, nor JSON of one"
        found["tool_calls"] = calls
    calls = found.get("tool_calls")
    if calls == []:
        del found["tool_calls"]
    elif calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        return f"tool_calls {shown(calls)}: not a list of objects"
    return found


def _refused_key(key: str) -> str:
    if key in _MEDIA_KEYS:
        return f"the key {key} holds what is not text, and LoraGrid trains on text; remove such messages"
    return f"the key {key} says what is learnt, and would be ignored; write train: false (or weight: 0), or remove it"


def _call(message: dict[str, Any]) -> dict[str, Any] | str:
    """A message whose text is a call of tools, as a message of the assistant with these calls."""
    text = message.get("content")
    try:
        value = parse_json(text) if isinstance(text, str) else text
    except ValueError as error:
        return f"role {message['role']}: {shown(text)}: not JSON: {error}"
    found = value if isinstance(value, list) else [value]
    calls = [dict(call) for call in found if isinstance(call, Mapping) and isinstance(call.get("name"), str)]
    if not calls or len(calls) < len(found):
        return f"role {message['role']}: {shown(text)}: not a call, which has a name and arguments"
    others = {key: item for key, item in message.items() if key not in ("role", "content")}
    return {
        **others,
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }


def text_of(content: object) -> str:
    """The text of a message's content: of a list of parts their texts, joined; empty without a content."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    return "" if content is None else json.dumps(content, sort_keys=True, default=str)
