"""Finds where a chat template writes the parts of a message, with a unique text in place of each."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loragrid.data.chats.messages import REASONING_KEYS
from loragrid.data.chats.template import ChatRefusedError, ChatTemplate, Messages, Tools

READ_KEYS = ("role", "content", "tool_calls", *REASONING_KEYS)


ARGUMENT = "an argument of a tool call"


@dataclass(frozen=True)
class Piece:
    """A text of a message and the marker in its place. kind: what it is, in words."""

    marker: str
    text: str
    kind: str

    def forms(self) -> Iterator[str]:
        """The text as templates write it: as it is, or inside JSON or Python text."""
        yield self.text
        for form in (json.dumps(self.text, ensure_ascii=False)[1:-1], json.dumps(self.text)[1:-1]):
            if form != self.text:
                yield form


class MarkedTurn:
    """A copy of a message whose texts are replaced by markers, and the pieces.

    White space at the edges of a text and tags that the template reads (such as <think>) stay, so that the template
    treats the copy as it treats the message.
    """

    def __init__(self, message: Mapping[str, Any], template: ChatTemplate) -> None:
        self.pieces: list[Piece] = []
        self._template = template
        self.message = dict(message)
        if "content" in message:
            self.message["content"] = self._content(message["content"])
        # The template can read the same reasoning under several names.
        for key in REASONING_KEYS:
            if key in message:
                first = next(name for name in REASONING_KEYS if name in message)
                self.message[key] = self._text(message[key], "reasoning") if key == first else self.message[first]
        if "tool_calls" in message:
            self.message["tool_calls"] = [
                {
                    **call,
                    "function": {
                        "name": self._piece(call["function"]["name"], "the name of a tool call"),
                        "arguments": self._values(_mapping(call["function"]["arguments"])),
                    },
                }
                for call in message["tool_calls"]
            ]

    def _content(self, content: Any) -> Any:
        if isinstance(content, list):
            return [{**part, "text": self._text(part["text"], "content")} for part in content]
        return self._text(content, "content")

    def _text(self, text: str, kind: str) -> str:
        parts, end, inside = [], 0, kind
        for tag in self._template.tags.finditer(text):
            parts += [self._segment(text[end : tag.start()], inside), tag.group()]
            inside = kind if tag.group().startswith(("</", "[/")) else f"{kind} after {tag.group()}"
            end = tag.end()
        return "".join([*parts, self._segment(text[end:], inside)])

    def _segment(self, text: str, kind: str) -> str:
        core = text.strip()
        return text.replace(core, self._piece(core, kind)) if core else text

    def _values(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._values(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._values(item) for item in value]
        return self._piece(value, ARGUMENT) if isinstance(value, str) and value else value

    def _piece(self, text: str, kind: str) -> str:
        marker = f"Zx{len(self.pieces)}marker{len(self.pieces)}xZ"
        self.pieces.append(Piece(marker, text, kind))
        return marker


def _mapping(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def extent(marked: str, rendered: str, pieces: Sequence[Piece], turn: str) -> tuple[int, int]:
    """Where the first piece begins in `rendered` and the last one ends.

    marked: the chat as rendered with the markers; apart from them it must be `rendered`. turn: the turn, in words.

    Raises:
        ChatRefusedError: a piece is left out, written twice or altered.
    """
    places = []
    for piece in pieces:
        count = marked.count(piece.marker)
        if count == 0:
            raise ChatRefusedError(f"the chat template leaves out {piece.kind} of {turn}, which would not be learnt")
        if count > 1:
            raise ChatRefusedError(f"the chat template writes {piece.kind} of {turn} {count} times")
        places.append((marked.index(piece.marker), piece))
    places.sort(key=lambda place: place[0])
    starts = [start for start, _ in places]
    read, position, first = 0, 0, None
    for (start, piece), following in zip(places, [*starts[1:], len(marked)], strict=True):
        gap = marked[read:start]
        read = start + len(piece.marker)
        after = marked[read:following]
        position += len(gap)
        if not rendered.startswith(gap, position - len(gap)):
            raise ChatRefusedError(_altered(turn))
        form = next((form for form in piece.forms() if rendered.startswith(form + after, position)), None)
        if form is None:
            raise ChatRefusedError(_altered(turn))
        first = position if first is None else first
        position += len(form)
    if first is None or rendered[position:] != marked[read:]:
        raise ChatRefusedError(_altered(turn))
    return first, position


def _altered(turn: str) -> str:
    return (
        f"the chat template renders {turn} in a way that depends on its text, so that what is the answer and what the "
        "template adds cannot be told apart"
    )


@dataclass(frozen=True)
class LeftOut:
    """What a template does not render: contents (in words), names of tools, keys of messages."""

    contents: tuple[str, ...]
    tools: tuple[str, ...]
    keys: tuple[str, ...]


def left_out(messages: Messages, tools: Tools, template: ChatTemplate) -> LeftOut:
    """What a prompt made of these messages lacks; a marker is appended to every text that is no answer.

    Earlier answers are not looked for: a template may shorten them, and the prompt is then what the model gets.

    Raises:
        ChatRefusedError: the template refuses the chat.
    """
    wanted: dict[str, str] = {}

    def marker(words: str) -> str:
        found = f"Zy{len(wanted)}added{len(wanted)}yZ"
        wanted[found] = words
        return found

    copies = []
    for number, message in enumerate(messages, 1):
        copy, words = dict(message), f"message {number} ({message['role']})"
        if message["role"] != "assistant" and "content" in message:
            content = message["content"]
            if isinstance(content, list):
                copy["content"] = [{**part, "text": f"{part['text']} {marker(words)}"} for part in content]
            else:
                copy["content"] = f"{content} {marker(words)}"
        copies.append(copy)
    num_contents = len(wanted)
    marked_tools = [
        {
            **tool,
            "function": {**tool["function"], "name": f"{tool['function']['name']}{marker(tool['function']['name'])}"},
        }
        for tool in tools or ()
    ]
    rendered = template.prompt(copies, marked_tools or None)
    missing = [
        (number < num_contents, words) for number, (found, words) in enumerate(wanted.items()) if found not in rendered
    ]
    other = {
        key
        for message in copies
        for key, value in message.items()
        if key not in READ_KEYS and value not in ("", [], {})
    }
    keys = [
        key
        for key in sorted(other)
        if template.prompt([{k: v for k, v in copy.items() if k != key} for copy in copies], marked_tools or None)
        == rendered
    ]
    return LeftOut(
        tuple(dict.fromkeys(words for is_content, words in missing if is_content)),
        tuple(words for is_content, words in missing if not is_content),
        tuple(keys),
    )
