"""Roles that a chat template has of its own, and roles that public data sets name otherwise."""

from typing import TYPE_CHECKING, Any

import pytest

from loragrid.data.shapes.messages import TOOL_ROLES, messages_of
from tests.support.chat_templates import PUBLIC_TEMPLATES, messages
from tests.support.learnt_text import learn, learnt_runs, notes, refusal, shown
from tests.support.tiny_tokenizers import byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANY_ROLE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NAMED = (
    "{% for m in messages %}{% if m.role == 'assistant_tool_call' %}{{ '<|im_start|>assistant\n<call>' + m.content }}"
    "{% elif m.role == 'tool_response' %}{{ '<|im_start|>tool_response\n' + m.content }}"
    "{% elif m.role in ('user', 'assistant', 'system', 'critic') %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_tokens(template: str) -> "PreTrainedTokenizerFast":
    tokenizer = byte_level(chat_template=template)
    tokenizer.add_tokens(["<|observation|>", "<|user|>", "<|assistant|>", "<|end|>"])
    return tokenizer


def text_of(tokenizer: "PreTrainedTokenizerFast", chat: list[dict[str, Any]]) -> str:
    """The row of a chat as it was read from a file."""
    read = messages_of(chat, "messages")
    (found,) = learn(tokenizer, read)
    assert isinstance(found, tuple), found
    return shown(tokenizer, found[0])


def test_a_role_that_becomes_a_token_is_kept() -> None:
    chat = messages(("u", "Hi"), ("a", "call"), ("observation", "0"), ("a", "Zero"))
    assert "<|observation|>\n0" in text_of(with_tokens(ANY_ROLE), chat)
    assert notes(with_tokens(ANY_ROLE), chat) == [("turn_not_ended",)]


@pytest.mark.parametrize("role", [*TOOL_ROLES, "function"])
def test_a_tools_role_that_the_template_lacks_is_renamed_and_noted(role: str) -> None:
    chat = messages(("u", "Hi"), ("a", "call"), (role, "0"), ("a", "Zero"))
    tokenizer = PUBLIC_TEMPLATES["qwen2.5"].tokenizer()
    assert "<tool_response>\n0\n</tool_response>" in text_of(tokenizer, chat)
    assert notes(tokenizer, chat) == [("role_as_tool",)]


@pytest.mark.parametrize("role", ["tool_response", "Tool_Response"])
def test_a_named_role_is_asked_for_before_it_is_renamed(role: str) -> None:
    chat = messages(("u", "Hi"), ("a", "call"), (role, "0"), ("a", "Zero"))
    assert "<|im_start|>tool_response\n0<|im_end|>" in text_of(byte_level(chat_template=NAMED), chat)


def test_another_role_of_the_assistant_is_learnt() -> None:
    tokenizer = byte_level(chat_template=NAMED)
    chat = messages(("u", "Hi"), ("assistant_tool_call", "f()"), ("tool_response", "0"), ("a", "Zero"))
    assert learnt_runs(tokenizer, chat) == [["<call>f()<|im_end|>", "Zero<|im_end|>"]]
    chat[1]["weight"] = 0
    assert learnt_runs(tokenizer, chat) == [["Zero<|im_end|>"]]
    assert notes(tokenizer, chat) == [("excluded_turns",)]
    assert learn(tokenizer, messages(("u", "Hi"), ("assistant_tool_call", "f()")))[0] != "without a token to learn"


def test_other_own_roles_are_noted_and_not_learnt() -> None:
    tokenizer = byte_level(chat_template=NAMED)
    chat = messages(("u", "Hi"), ("a", "Blue"), ("critic", "No."), ("a", "Red"))
    assert learnt_runs(tokenizer, chat) == [["Blue<|im_end|>", "Red<|im_end|>"]]
    assert notes(tokenizer, chat) == [("own_roles",)]
    chat[2]["train"] = True
    assert "only the assistant's turns can be learnt" in refusal(tokenizer, chat)


def test_an_own_role_is_refused_where_answers_have_no_header() -> None:
    template = "{% for m in messages %}{% if m.role != 'critic' %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    chat = messages(("u", "Hi"), ("critic", "No."), ("a", "Red"))
    assert "leaves out message 2 (critic)" in refusal(byte_level(chat_template=template), chat)
    named = template.replace("!= 'critic'", "in ('user', 'critic', 'assistant')")
    assert "whether the model writes it cannot be told" in refusal(byte_level(chat_template=named), chat)


@pytest.mark.parametrize("role", ["bservation", "asistant", "narrator", "", "im", "start"])
def test_a_role_in_another_token_is_unknown(role: str) -> None:
    for template in (ANY_ROLE, NAMED, None):
        tokenizer = with_tokens(template) if template else byte_level()
        assert "unknown role" in refusal(tokenizer, messages(("u", "Hi"), (role, "Blue"), ("a", "Red")))
