"""Answers with tags that the chat template reads, such as <think>."""

from functools import cache
from typing import TYPE_CHECKING

import pytest

from tests.support.chat_templates import PUBLIC_TEMPLATES, messages
from tests.support.learnt_text import learnt_runs, refusal
from tests.support.tiny_tokenizers import byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALWAYS_EMPTY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def tokenizer_of(name: str) -> "PreTrainedTokenizerFast":
    return byte_level(chat_template=ALWAYS_EMPTY) if name == "always" else PUBLIC_TEMPLATES[name].tokenizer()


@pytest.mark.parametrize(
    "content",
    [
        "The tag </think> is used by Qwen.",
        "It opens with <think>; </think> closes.",
        "</think> closes.",
        "Ends with </think>",
        "Use <think> and </think>, then <think>",
        "<think>\nhm\n</think>\n\nThe tag </think> closes.",
        "hm\n</think>\n\nBlue",
        "Sure. <think>\nhm\n</think>\n\nBlue",
    ],
)
def test_an_answer_that_mentions_a_tag_is_refused(content: str) -> None:
    assert "of message 2" in refusal(tokenizer_of("qwen3"), messages(("u", "Hi"), ("a", content)))


@pytest.mark.parametrize(
    ("content", "learnt"),
    [
        ("<think>\nhm\n</think>\n\nBlue", "<think>\nhm\n</think>\n\nBlue"),
        ("<think>hm</think>Blue", "<think>\nhm\n</think>\n\nBlue"),
        ("\n<think>\n\n</think>\n\nBlue", "<think>\n\n</think>\n\nBlue"),
        ("<think>\nhm\n</think>", "<think>\nhm\n</think>\n\n"),
        ("It begins with <think> alone.", "<think>\n\n</think>\n\nIt begins with <think> alone."),
    ],
)
def test_a_block_at_the_beginning_is_learnt(content: str, learnt: str) -> None:
    assert learnt_runs(tokenizer_of("qwen3"), messages(("u", "Hi"), ("a", content))) == [[f"{learnt}<|im_end|>"]]


def test_what_the_prompt_opens_may_be_written_or_not() -> None:
    for content in ("<think>\nhm\n</think>\n\nBlue", "<think>hm</think>Blue", "hm\n</think>\n\nBlue"):
        chat = messages(("u", "Hi"), ("a", content))
        assert learnt_runs(tokenizer_of("qwen3_thinking"), chat) == [["hm\n</think>\n\nBlue<|im_end|>"]]
    mention = messages(("u", "Hi"), ("a", "The tag </think> is used."))
    assert "reads the tag </think>" in refusal(tokenizer_of("qwen3_thinking"), mention)


@pytest.mark.parametrize("name", ["qwen3", "always"])
def test_reasoning_given_twice_is_refused(name: str) -> None:
    chat = messages(("u", "Hi"), ("a", "<think>\none\n</think>\n\nBlue"))
    chat[1]["reasoning_content"] = "two"
    assert "which begins with such a block" in refusal(tokenizer_of(name), chat)


def test_a_block_behind_the_templates_empty_one_is_refused() -> None:
    for content in ("<think>\none\n</think>\n\nBlue", "<think></think>Blue"):
        reason = refusal(tokenizer_of("always"), messages(("u", "Hi"), ("a", content)))
        assert "a block that ends with </think> before the content of message 2" in reason
    plain = messages(("u", "Hi"), ("a", "</think> is a tag"))
    assert learnt_runs(tokenizer_of("always"), plain) == [["<think>\n\n</think>\n\n</think> is a tag<|im_end|>"]]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma2", "zephyr"])
def test_tags_that_a_template_does_not_read_are_text(name: str) -> None:
    content = "It opens; </think> closes <think>."
    ((learnt,),) = learnt_runs(tokenizer_of(name), messages(("u", "Hi"), ("a", content)))
    assert content in learnt


def test_tags_of_tools_in_an_answer_are_text() -> None:
    content = "Call <tool_call>\nlookup\n</tool_call> then [INST] and </tool_call>."
    chat = messages(("u", "Hi"), ("a", content))
    assert learnt_runs(tokenizer_of("qwen2.5"), chat) == [[f"{content}<|im_end|>"]]
