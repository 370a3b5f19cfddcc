"""End tokens that stand in a message's own text."""

from functools import cache
from typing import TYPE_CHECKING

import pytest

from tests.support.chat_templates import PUBLIC_TEMPLATES, messages
from tests.support.learnt_text import learn, learnt_runs, notes, shown
from tests.support.tiny_tokenizers import byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENDS = {
    "chatml": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "llama3_always": "<|eot_id|>",
    "mistral_nemo": "</s>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "zephyr": "</s>",
    "harmony": "<|return|>",
    "command_r7b": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "granite": "<|end_of_text|>",
    "vicuna": "</s>",
}
PLAIN = messages(("u", "Hi"), ("a", "Blue"), ("u", "And?"), ("a", "Red"))


@cache
def tokenizer_of(name: str) -> "PreTrainedTokenizerFast":
    return PUBLIC_TEMPLATES[name].tokenizer()


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("behind", ["", "\n"])
def test_an_answers_own_end_token_is_not_doubled(name: str, behind: str) -> None:
    ended = messages(("u", "Hi"), ("a", f"Blue{ENDS[name]}{behind}"), ("u", "And?"), ("a", f"Red{ENDS[name]}{behind}"))
    for turns in ("auto", "separate"):
        assert learnt_runs(tokenizer_of(name), ended, turns=turns) == learnt_runs(
            tokenizer_of(name), PLAIN, turns=turns
        )
    assert "end_not_doubled" in notes(tokenizer_of(name), ended)[0]
    assert "special_tokens_read" not in notes(tokenizer_of(name), ended)[0]


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "granite"])
def test_a_questions_own_end_token_is_not_doubled(name: str) -> None:
    tokenizer, end = tokenizer_of(name), ENDS[name]
    ended = messages(("s", f"Be brief.{end}"), ("u", f"Hi{end}"), ("a", "Blue"))
    plain = messages(("s", "Be brief."), ("u", "Hi"), ("a", "Blue"))
    assert notes(tokenizer, ended) == [("end_not_doubled",)]
    (found,), (expected,) = learn(tokenizer, ended), learn(tokenizer, plain)
    assert isinstance(found, tuple)
    assert isinstance(expected, tuple)
    assert shown(tokenizer, found[0]) == shown(tokenizer, expected[0])


def test_end_tokens_elsewhere_are_kept_and_noted() -> None:
    chat = messages(("u", "Hi"), ("a", "Blue<|im_end|> is the end"))
    assert learnt_runs(tokenizer_of("chatml"), chat) == [["Blue<|im_end|> is the end<|im_end|>"]]
    assert notes(tokenizer_of("chatml"), chat) == [("special_tokens_read",)]


def test_an_end_that_the_template_does_not_write_is_kept() -> None:
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    tokenizer = byte_level(chat_template=template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    for end in ("<|user|>", "<|im_end|>"):
        assert learnt_runs(tokenizer, messages(("u", "Hi"), ("a", f"Blue{end}"))) == [[f"Blue{end}"]]
