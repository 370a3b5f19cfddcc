"""The tokens that end a text or a turn of the assistant. Every other special token is content, also at the end."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loragrid.data.chats.template import ANSWER, QUESTION, ChatRefusedError, ChatTemplate, Messages
from loragrid.data.chats.tool_form import find_tool_form
from loragrid.data.chats.turns import end_of_turn
from loragrid.models.base_ends import BASE_ENDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALL: dict[str, Any] = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"of": ANSWER}},
}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look_up", "description": "", "parameters": {"type": "object"}},
}


def end_token_ids(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None = None) -> frozenset[int]:
    """The ids of the tokens that end a text or an answer.

    They are the tokenizer's end token, the tokens with which its chat templates (and the text `chat_template`) end the
    assistant's turns, and the added tokens among the end tokens of the base's generation, if the base is known.
    """
    own = tokenizer.chat_template
    texts = [*own.values()] if isinstance(own, Mapping) else [own]
    found = {number for text in dict.fromkeys([*texts, chat_template]) if text for number in _of_turns(tokenizer, text)}
    # A number that is no added token is a mistake in the base's files: a text may not end with a common word.
    found |= set(getattr(tokenizer, BASE_ENDS, ())) & tokenizer.added_tokens_decoder.keys()
    found -= {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id}
    eos = tokenizer.eos_token_id
    return frozenset(found if eos is None else found | {int(eos)})


def _of_turns(tokenizer: "PreTrainedTokenizerBase", text: str) -> set[int]:
    """The last token behind an answer in trial chats, and behind a tool call if the template writes any."""
    template = ChatTemplate(tokenizer, text)
    found = set()
    for messages, follower, tools in _trials(template):
        try:
            after = _behind_answer(template, messages, tools)
        except ChatRefusedError:
            continue
        try:
            continued = _behind_answer(template, [*messages, follower], tools)
        except ChatRefusedError:
            continued = None
        if after is None:
            continue
        ending, has_token = end_of_turn(after, continued, template)
        if has_token:
            last = list(template.token.finditer(ending))[-1].group()
            found.add(int(tokenizer.convert_tokens_to_ids(last)))  # type: ignore[arg-type]
    return found


def _trials(template: ChatTemplate) -> Iterator[tuple[Messages, Mapping[str, Any], list[dict[str, Any]] | None]]:
    """Chats that end with the assistant, a message that can follow, and the tools."""
    question = template.trial("user", QUESTION)
    yield [question, template.trial("assistant", ANSWER)], question, None
    if not template.mentions("tool_calls"):
        return
    call: list[dict[str, Any]] = [question, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    try:
        formed = find_tool_form(call, [_TOOL], template).formed_all(call)
    except ChatRefusedError:
        return
    yield formed, {**template.trial("tool", QUESTION), "name": "look_up", "tool_call_id": "call12345"}, [_TOOL]


def _behind_answer(template: ChatTemplate, messages: Messages, tools: list[dict[str, Any]] | None) -> str | None:
    rendered = template.render(messages, tools)
    return rendered.rpartition(ANSWER)[2] if ANSWER in rendered else None
