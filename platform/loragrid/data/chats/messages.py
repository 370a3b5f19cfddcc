"""Reads a canonical row's messages and tools into the form that a chat template takes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loragrid.data.chats.roles import ChatRoles
from loragrid.data.chats.template import ChatRefusedError, ChatTemplate
from loragrid.data.shapes.messages import TOOL_ROLES
from loragrid.data.values import HALF_CHARACTERS, shown
from loragrid.schema.errors import is_unicode

ROLES = ("system", "developer", "user", "assistant", "tool")
WEIGHT_KEYS = ("weight", "train", "training", "train_turn", "loss")
"""Keys of a message that say whether it is learnt: 0 and false, or 1 and true. The template never gets them."""

PARTLY_LEARNT_KEYS = ("train_detail",)
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; a template that reads any of them gets it under that name."""

TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages as the template takes them, what is learnt of them, and what was noticed.

    learnt: the numbers of the assistant's turns that are learnt. num_empty: how many turns of the assistant are empty.
    excluded: whether the data exclude a turn. notes: names in `ROW_NOTES`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    learnt: tuple[int, ...]
    num_empty: int
    excluded: bool
    notes: tuple[str, ...]


def read_chat(row: Mapping[str, Any], roles: ChatRoles) -> Chat | None:
    """The chat of a canonical row; None if it has no messages.

    Raises:
        ChatRefusedError: the messages or the tools are not as the template needs them, or wish what is not supported.
    """
    value = row.get("messages")
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ChatRefusedError(f"{shown(value)}: not a list of messages")
    notes: list[str] = []
    messages, learnt, num_empty, excluded = [], [], 0, False
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ChatRefusedError(f"{shown(message)}: not a message, which has a role and a content")
        is_learnt = _is_learnt(message, number, roles)
        read = _read_message(message, number, roles, notes)
        messages.append(read)
        if roles.is_assistant(read["role"]):
            if not is_learnt:
                excluded = True
            elif is_empty(read):
                num_empty += 1
            else:
                learnt.append(number - 1)
    if excluded:
        notes.append("excluded_turns")
    if num_empty and learnt:
        notes.append("empty_turns")
    tools = _read_tools(row.get("tools"), notes)
    return Chat(
        messages=messages,
        tools=tools,
        learnt=tuple(learnt),
        num_empty=num_empty,
        excluded=excluded,
        notes=tuple(dict.fromkeys(notes)),
    )


def is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a turn says nothing: neither content other than white space, nor tool calls, nor reasoning."""
    spoken = [text_of(message.get("content")), *(text_of(message.get(key)) for key in REASONING_KEYS)]
    return not message.get("tool_calls") and not any(text.strip() for text in spoken)


def text_of(content: object) -> str:
    """The text of a content: of a list of parts, the text of all."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _is_learnt(message: Mapping[str, Any], number: int, roles: ChatRoles) -> bool:
    """Whether the data want a turn learnt."""
    for key in PARTLY_LEARNT_KEYS:
        if message.get(key) is not None:
            raise ChatRefusedError(f"message {number} has {key}; only whole turns can be excluded, by weight: 0")
    wishes = {}
    for key in WEIGHT_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ChatRefusedError(f"message {number} has {key}: {shown(value)}; allowed: 0 or false, 1 or true")
        wishes[key] = bool(value)
    if len(set(wishes.values())) > 1:
        raise ChatRefusedError(f"message {number} has contradicting keys: {', '.join(wishes)}")
    # OpenAI's weight says nothing about other roles; the other keys ask for a turn of any role.
    asked = [key for key, value in wishes.items() if value and key != "weight"]
    if asked and not roles.is_assistant(message["role"]):
        raise ChatRefusedError(
            f"message {number} of the role {message['role']} has {asked[0]}: true, but only the assistant's turns can "
            "be learnt; remove the key, or learn all tokens with data.loss_on: all"
        )
    return all(wishes.values())


def _read_message(message: Mapping[str, Any], number: int, roles: ChatRoles, notes: list[str]) -> dict[str, Any]:
    template = roles.template
    # Columnar files store null for keys that only other messages have, but templates test whether a key exists.
    read = {key: value for key, value in message.items() if value is not None and key not in WEIGHT_KEYS}
    if not is_unicode(json.dumps(read, ensure_ascii=False, default=str)):
        raise ChatRefusedError(HALF_CHARACTERS)
    if "function_call" in read:  # OpenAI's older form of one tool call
        read["tool_calls"] = [{"type": "function", "function": read.pop("function_call")}]
    if read["role"] in ("function", *TOOL_ROLES) and not roles.has(read["role"]):
        read["role"] = "tool"
        notes.append("role_as_tool")
    if read["role"] == "developer" and not template.names_role("developer"):
        read["role"] = "system"
        notes.append("developer_as_system")
    if read["role"] not in ROLES and not roles.has(read["role"]):
        raise ChatRefusedError(
            f"message {number} has the unknown role {shown(read['role'])}; allowed: {', '.join(ROLES)}, and roles that "
            "the chat template names"
        )
    if read["role"] not in (*ROLES, "function", *TOOL_ROLES) and not roles.is_assistant(read["role"]):
        notes.append("own_roles")
    calls = read.pop("tool_calls", None)
    if calls:
        read["tool_calls"] = _read_calls(calls, read["role"], number, roles, notes)
    if "content" not in read and not calls and not any(read.get(key) for key in REASONING_KEYS):
        if roles.is_assistant(message["role"]) and "content" in message:
            read["content"] = ""
        else:
            raise ChatRefusedError(
                f"message {number} ({read['role']}) has no content: {shown(message)}: not a message, which has a role "
                "and a content"
            )
    if "content" in read:
        read["content"] = _read_content(read["content"], number, template)
    reasonings = {text_of(read.pop(key)) for key in REASONING_KEYS if key in read and isinstance(read[key], str)}
    if any(key in read for key in REASONING_KEYS) or len(reasonings) > 1:
        raise ChatRefusedError(f"message {number} has reasoning that is not one text")
    if reasonings != {""}:
        named = [key for key in REASONING_KEYS if template.mentions(key)] or [REASONING_KEYS[0]]
        for text in reasonings:
            read |= dict.fromkeys(named, text)
    return read


def _read_content(content: object, number: int, template: ChatTemplate) -> object:
    """Text, or a list of text parts if the template takes it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if template.needs_parts else content
    if not isinstance(content, list):
        raise ChatRefusedError(f"message {number} has the content {shown(content)}: neither text nor a list of parts")
    parts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS:
            raise ChatRefusedError(
                f"message {number} has a part of the type {shown(kind)}; allowed: text, because only text is trained"
            )
        if not isinstance(text, str):
            raise ChatRefusedError(f"message {number} has the part {shown(part)}: without text")
        parts.append({"type": "text", "text": text})
    return parts if template.takes_parts else text_of(parts)


def _read_calls(calls: object, role: str, number: int, roles: ChatRoles, notes: list[str]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as a mapping; `ToolForm` gives them the form that the template reads."""
    if not roles.is_assistant(role):
        raise ChatRefusedError(f"message {number} has tool_calls, but the role {role}; allowed: assistant")
    if not isinstance(calls, list):
        raise ChatRefusedError(f"message {number} has tool_calls {shown(calls)}: not a list")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise ChatRefusedError(f"message {number} has the tool call {shown(call)}: without the name of a function")
        own = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
        given = function.get("arguments")
        read.append(
            {"type": "function", **own, "function": {"name": name, "arguments": _arguments(given, name, number, notes)}}
        )
    return read


def _arguments(given: object, name: str, number: int, notes: list[str]) -> dict[str, Any]:
    value = given
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except ValueError as error:
            what = f"message {number} calls {name} with arguments that are no JSON: {shown(given)}: {error}"
            raise ChatRefusedError(what) from error
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ChatRefusedError(f"message {number} calls {name} with {shown(given)}: not a JSON object of arguments")
    # JSON text holds the nulls that its writer meant.
    return value if isinstance(given, str) else _without_nulls(value, notes)


def _read_tools(value: object, notes: list[str]) -> list[dict[str, Any]] | None:
    tools = value
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ChatRefusedError(f"{shown(value)}: no JSON: {error}", column="tools") from error
    if isinstance(tools, Mapping):
        raise ChatRefusedError(f"{shown(value)}: not a list of tools, but one mapping", column="tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ChatRefusedError(f"{shown(value)}: not a list of tools", column="tools")
    read = []
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatRefusedError(f"{shown(tool)}: a tool without the name of its function", column="tools")
        if "function" not in tool:
            notes.append("tools_wrapped")
            tool = {"type": "function", "function": tool}
        read.append(tool if isinstance(value, str) else _without_nulls(tool, notes))
    return read


def _without_nulls(value: Any, notes: list[str]) -> Any:
    """The value without keys whose value is null: columnar files store null for keys that only other rows have."""
    if isinstance(value, Mapping):
        if None in value.values():
            notes.append("nulls_left_out")
        return {key: _without_nulls(item, notes) for key, item in value.items() if item is not None}
    return [_without_nulls(item, notes) for item in value] if isinstance(value, list) else value
