"""Finds what a turn of the assistant teaches: the text that the model would write after the prompt, with its end.

1. The prompt is what the template renders for the messages before the turn, with the generation prompt.
2. The chat up to the turn is rendered once as it is and once with markers in place of the turn's texts. The two must be
   equal apart from the markers, which shows where the answer is.
3. The turn ends with the end token that the template writes behind the answer both at the end of a chat and before the
   next question.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loragrid.data.chats.markers import ARGUMENT, READ_KEYS, LeftOut, MarkedTurn, extent, left_out
from loragrid.data.chats.messages import Chat
from loragrid.data.chats.prompts import answer_start
from loragrid.data.chats.tags import check_tags
from loragrid.data.chats.template import (
    OTHER_TEMPLATE,
    QUESTION,
    ChatRefusedError,
    ChatTemplate,
    Messages,
    Tools,
    common_prefix,
)
from loragrid.data.chats.tool_form import ToolForm, find_tool_form

Kept = TypeVar("Kept")
MOST_KEPT_STRUCTURES = 4096


@dataclass(frozen=True, kw_only=True)
class LearntTurn:
    """A rendered chat up to a turn, and what the turn teaches.

    text: prompt, answer and what the template writes behind it. spans: the character ranges that are learnt, in their
    order. end: where the answer with its end ends. is_apart: whether the template renders the prompt differently when
    an answer follows. notes: names in `ROW_NOTES`.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    end: int
    is_apart: bool
    notes: tuple[str, ...]


@dataclass
class TurnFinder:
    """Finds what turns teach, with one template. What depends on a chat's structure alone is found once."""

    template: ChatTemplate
    _left_out: dict[object, LeftOut] = field(default_factory=dict)
    _ends: dict[object, tuple[str, bool]] = field(default_factory=dict)
    _forms: dict[object, ToolForm] = field(default_factory=dict)
    _unread: dict[object, bool] = field(default_factory=dict)

    def formed(self, chat: Chat) -> list[dict[str, Any]]:
        """The messages with tool calls in the form that the template reads."""
        if not any("tool_calls" in message for message in chat.messages):
            return chat.messages
        key = _structure(chat.messages, chat.tools)
        if key not in self._forms:
            _keep(self._forms, key, find_tool_form(chat.messages, chat.tools, self.template))
        return self._forms[key].formed_all(chat.messages)

    def check_rendered(self, messages: Messages, tools: Tools) -> tuple[str, ...]:
        """The notes about what the template does not render of a prompt.

        Raises:
            ChatRefusedError: it leaves out a message or a tool.
        """
        key = _structure(messages, tools)
        if key not in self._left_out:
            try:
                found = left_out(messages, tools, self.template)
            except ChatRefusedError:  # the chat itself is not refused, only what was appended to its texts
                found = LeftOut((), (), ())
            _keep(self._left_out, key, found)
        found = self._left_out[key]
        if found.tools:
            raise ChatRefusedError(
                f"the chat template does not render the tool {found.tools[0]}; {OTHER_TEMPLATE}", column="tools"
            )
        if found.contents:
            raise ChatRefusedError(f"the chat template leaves out {found.contents[0]}; {OTHER_TEMPLATE}")
        return ("keys_not_rendered",) if found.keys else ()

    def _has_unread_keys(self, messages: Messages, tools: Tools) -> bool:
        """Whether the last message has a key that changes nothing in the rendered chat."""
        last = messages[-1]
        others = [key for key, value in last.items() if key not in READ_KEYS and value not in ("", [], {})]
        if not others:
            return False
        key = ("keys", _structure(messages, tools))
        if key not in self._unread:
            text = self.template.render(messages, tools)
            kept = [{name: value for name, value in last.items() if name != other} for other in others]
            try:
                unread = any(self.template.render([*messages[:-1], one], tools) == text for one in kept)
            except ChatRefusedError:  # the template demands a key
                unread = False
            _keep(self._unread, key, unread)
        return self._unread[key]

    def find(self, messages: Messages, tools: Tools, number: int) -> LearntTurn:
        """What message `number`, counted from 0, teaches.

        Raises:
            ChatRefusedError: it cannot be told for certain, or the template refuses the chat.
        """
        template, until, words = self.template, messages[: number + 1], f"message {number + 1}"
        text = template.render(until, tools)
        turn = MarkedTurn(messages[number], template)
        form = ToolForm.of(messages[number])
        copy = form.formed(turn.message)
        marked = template.render([*until[:-1], copy], tools)
        # A template can write tool calls without any of their arguments.
        unwritten = [piece for piece in turn.pieces if piece.kind == ARGUMENT]
        if unwritten and any(piece.marker in marked for piece in unwritten):
            unwritten = []
        first, last = extent(marked, text, [piece for piece in turn.pieces if piece not in unwritten], words)
        prompt = template.prompt(messages[:number], tools) if number else _opening_of_chat(text, first, template)
        is_apart = not text.startswith(prompt)
        if not is_apart:
            prompt += self._unasked_header(text[len(prompt) : first])
        notes = list(self.check_rendered(messages[:number], tools)) if number else []
        notes += ["arguments_not_rendered"] if unwritten else []
        notes += ["keys_not_rendered"] if self._has_unread_keys(until, tools) else []
        if is_apart:
            start = answer_start(text, first, prompt, until, tools, template)
            text, shift = prompt + text[start:], len(prompt) - start
            first, last = first + shift, last + shift
            notes.append("prompt_apart")
        start = len(prompt)
        check_tags(messages[number].get("content"), text, start, template.tags, words)
        self._check_start(text[start:first], messages[:number], tools, prompt)
        ending, has_token = self._ending(until, tools, copy, _last_marker(marked, turn), text[last:])
        if not has_token:
            notes.append("turn_not_ended")
        spans = [(start, last + len(ending))]
        if template.has_generation_blocks and not is_apart:
            spans, left = self._inside_blocks(until, tools, (start, last, last + len(ending)), words)
            notes += ["end_outside_block"] if left else []
        return LearntTurn(text=text, spans=tuple(spans), end=last + len(ending), is_apart=is_apart, notes=tuple(notes))

    def _unasked_header(self, between: str) -> str:
        """What stands between a prompt and an answer up to the generation prompt, if the prompt lacks it here."""
        header = self.template.opening.prompt
        return between[: between.rindex(header) + len(header)] if header and header in between else ""

    def _check_start(self, between: str, before: Messages, tools: Tools, prompt: str) -> None:
        """Refuse an answer before which stands what may be the header of its role."""
        opening = self.template.opening
        if not between.strip() or opening.is_known or not before:
            return
        if self.template.render(before, tools) == prompt:
            raise ChatRefusedError(
                f"the chat template writes {between!r} before the answer, but renders no generation prompt: whether "
                f"the model or the template writes it cannot be told; {OTHER_TEMPLATE}",
                is_of_prompt=True,
            )

    def _ending(
        self, until: Messages, tools: Tools, turn: Mapping[str, Any], marker: str, after: str
    ) -> tuple[str, bool]:
        """What ends a turn, as the beginning of the text `after` its last piece, and whether it holds an end token.

        turn: the turn with markers, whose last one in the rendered chat is `marker`.
        """
        key = _structure(until, tools)
        found = self._ends.get(key)
        if found is None or not after.startswith(found[0]) or (not found[0] and after):
            continued = self._continued([*until[:-1], turn], tools, marker)
            found = end_of_turn(after, continued, self.template)
            _keep(self._ends, key, found)
        return found

    def _continued(self, messages: Messages, tools: Tools, marker: str) -> str | None:
        """What stands behind the marker if the chat goes on; None if the template lets nobody go on."""
        followers = [self.template.trial("user", QUESTION)]
        if "tool_calls" in messages[-1]:
            followers = [{**self.template.trial("tool", QUESTION), "name": "tool"}, *followers]
        for follower in followers:
            try:
                rendered = self.template.render([*messages, follower], tools)
            except ChatRefusedError:
                continue
            behind = rendered.rpartition(marker)[2] if marker in rendered else ""
            if QUESTION in behind:
                return behind
        return None

    def _inside_blocks(
        self, until: Messages, tools: Tools, turn: tuple[int, int, int], words: str
    ) -> tuple[list[tuple[int, int]], bool]:
        """The parts of a turn inside the template's generation blocks, with its end; whether the end is outside them.

        turn: where the turn starts, where its last piece ends, where its end ends.
        """
        start, last, end = turn
        blocks = self.template.generation_blocks(until, tools)
        parts = [(max(start, begin), min(end, stop)) for begin, stop in blocks if begin < end and stop > start]
        if not parts:
            raise ChatRefusedError(
                f"the chat template has generation blocks, but {words} stands in none of them (where "
                f"blocks inside macros stand is unknown); {OTHER_TEMPLATE}"
            )
        if parts[-1][1] < end:
            return [*parts[:-1], *_joined(parts[-1], (last, end))], end > last
        return parts, False


def end_of_turn(after: str, continued: str | None, template: ChatTemplate) -> tuple[str, bool]:
    """What ends a turn, and whether it holds an end token.

    after: what stands behind the turn's last piece at the end of a chat. continued: what stands there if the chat goes
    on; None if that is not known. White space behind the end token is not learnt: nobody generates it.
    """
    after = after.removesuffix(template.opening.always)
    shared = after
    if continued is not None:
        shared = common_prefix(after, continued)
        # A token that only begins in both is in neither.
        cut = [found.start() for found in template.token.finditer(after) if found.start() < len(shared) < found.end()]
        shared = shared[: cut[0]] if cut else shared
    opener = template.opening.opener
    if opener and opener in shared:  # the next message begins there
        shared = shared[: shared.index(opener)]
    tokens = list(template.token.finditer(shared))
    if tokens and continued is not None:
        return shared[: tokens[-1].end()], True
    # The end of a chat has a token of its own, or nothing tells how the chat goes on.
    tokens = list(template.token.finditer(after))
    if tokens:
        return after[: tokens[-1].end()], True
    return shared, False


def _opening_of_chat(text: str, first: int, template: ChatTemplate) -> str:
    """The prompt of a chat that begins with the assistant: everything up to the end of the generation prompt."""
    prompt = template.opening.prompt
    if template.opening.is_known and not prompt:  # answers have no header
        return text[:first].rstrip()
    place = text.rfind(prompt, 0, first) if prompt else -1
    if place < 0:
        raise ChatRefusedError(
            "the chat begins with the assistant, and where its first answer begins cannot be told, because the chat "
            f"template writes no generation prompt before it; {OTHER_TEMPLATE}",
            is_of_prompt=True,
        )
    return text[: place + len(prompt)]


def _last_marker(marked: str, turn: MarkedTurn) -> str:
    return max((piece.marker for piece in turn.pieces), key=marked.rfind)


def _joined(one: tuple[int, int], other: tuple[int, int]) -> list[tuple[int, int]]:
    return [(one[0], other[1])] if one[1] >= other[0] else [one, other]


def _structure(messages: Messages, tools: Tools) -> object:
    """What a template's treatment of a chat depends on, apart from its texts."""
    return tuple(
        (
            message["role"],
            tuple(sorted(key for key, value in message.items() if value not in ("", [], {}))),
            isinstance(message.get("content"), list) and len(message["content"]),
            tuple(_num_arguments(call) for call in message.get("tool_calls", ())),
        )
        for message in messages
    ), tuple(tool["function"]["name"] for tool in tools or ())


def _num_arguments(call: Mapping[str, Any]) -> int:
    arguments = call["function"]["arguments"]
    return -1 if isinstance(arguments, str) else len(arguments)


def _keep(kept: dict[object, Kept], key: object, value: Kept) -> None:
    if len(kept) >= MOST_KEPT_STRUCTURES:
        kept.clear()
    kept[key] = value
