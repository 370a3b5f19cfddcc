"""Finds the form in which a chat template reads tool calls: their arguments, and a content that is absent."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loragrid.data.chats.template import ChatRefusedError, ChatTemplate, Messages, Tools

NAME, KEY, VALUE = "Fn7callFn", "Ky7keyKy", 'Va7"valueVa'
VALUE_BEGINS = VALUE.partition('"')[0]
"""Of a trial call; the quotation mark in the value shows whether the arguments are written as JSON once."""


@dataclass(frozen=True)
class ToolForm:
    """as_text: whether arguments are JSON text (as in OpenAI's files) instead of a mapping.

    has_content: whether a turn with tool calls and without content has the content "" instead of none.
    """

    as_text: bool = False
    has_content: bool = False

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> "ToolForm":
        """The form that a message has."""
        calls = message.get("tool_calls", ())
        as_text = any(isinstance(call["function"]["arguments"], str) for call in calls)
        return cls(as_text=as_text, has_content="content" in message)

    def formed(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message in this form."""
        if "tool_calls" not in message:
            return dict(message)
        formed = dict(message)
        if not message.get("content"):
            formed.pop("content", None)
            formed |= {"content": ""} if self.has_content else {}
        formed["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": self._arguments(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
        return formed

    def formed_all(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages in this form."""
        return [self.formed(message) for message in messages]

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, str):
            value = json.loads(value)
        return json.dumps(value, ensure_ascii=False) if self.as_text else value


FORMS = (ToolForm(), ToolForm(has_content=True), ToolForm(as_text=True), ToolForm(as_text=True, has_content=True))


def find_tool_form(messages: Messages, tools: Tools, template: ChatTemplate) -> ToolForm:
    """The first form in which the template writes a call's name, and its arguments as JSON, in Python, or as they are.

    It is tried with the chat's first tool call. Without such a form it is the first in which no argument is written.

    Raises:
        ChatRefusedError: the template writes tool calls in no such way, or refuses the chat.
    """
    number = next(number for number, message in enumerate(messages) if "tool_calls" in message)
    trial = dict(messages[number])
    first, *others = trial["tool_calls"]
    trial["tool_calls"] = [{**first, "function": {"name": NAME, "arguments": {KEY: VALUE}}}, *others]
    faults: list[str] = []
    without_arguments: list[ToolForm] = []
    for form in FORMS:
        copies = form.formed_all([*messages[:number], trial])
        try:
            rendered = template.render(copies, tools)
        except ChatRefusedError as error:
            faults.append(str(error))
            continue
        if NAME not in rendered:
            faults.append("the chat template does not render tool_calls")
        elif KEY not in rendered and VALUE_BEGINS not in rendered:
            without_arguments.append(form)
        elif not _is_written(rendered):
            faults.append(
                "the chat template does not write the arguments of tool calls as JSON, in Python, or as they are"
            )
        else:
            return form
    if without_arguments:
        return without_arguments[0]
    # What the template does not write says more than what it cannot read in one of the forms.
    fault = next((fault for fault in faults if " does not " in fault), faults[0])
    raise ChatRefusedError(f"message {number + 1}: {fault}; data.chat_template can name another template")


def _is_written(rendered: str) -> bool:
    escaped = json.dumps(VALUE)[1:-1]
    if re.search(rf'"{KEY}"\s*:\s*"{re.escape(escaped)}"', rendered):
        return True
    # As the keyword argument of a call in Python, as LFM2 writes it.
    if re.search(rf"\b{NAME}\([^()]*\b{KEY}\s*=\s*('{re.escape(VALUE)}'|\"{re.escape(escaped)}\")", rendered):
        return True
    # As in XML: neither quoted by Python nor escaped for a second time.
    return KEY in rendered and VALUE in rendered and f"'{KEY}'" not in rendered and f"'{VALUE}'" not in rendered
