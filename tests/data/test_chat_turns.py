"""Which of a chat's turns are learnt: `data.turns`, excluded turns and empty ones."""

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat_templates import PUBLIC_TEMPLATES, messages
from tests.support.learnt_text import learn, learnt_runs, notes, refusal, shown
from tests.support.tiny_tokenizers import byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

THREE = messages(("u", "One?"), ("a", "Blue"), ("u", "Two?"), ("a", "Red"), ("u", "Three?"), ("a", "Green"))
PAIR = messages(("u", "One?"), ("a", "Blue"))


@pytest.fixture(scope="module")
def chatml() -> "PreTrainedTokenizerFast":
    return byte_level()


@pytest.fixture(scope="module")
def qwen3() -> "PreTrainedTokenizerFast":
    return PUBLIC_TEMPLATES["qwen3"].tokenizer()


def with_keys(number: int, **keys: Any) -> list[dict[str, Any]]:
    return [message | (keys if index == number else {}) for index, message in enumerate(THREE)]


def test_all_turns_are_learnt_in_one_row(chatml: "PreTrainedTokenizerFast") -> None:
    for turns in ("auto", "all"):
        assert learnt_runs(chatml, THREE, turns=turns) == [["Blue<|im_end|>", "Red<|im_end|>", "Green<|im_end|>"]]
        assert notes(chatml, THREE, turns=turns) == [()]


def test_last_learns_the_last_turn_only(chatml: "PreTrainedTokenizerFast") -> None:
    assert learnt_runs(chatml, THREE, turns="last") == [["Green<|im_end|>"]]


def test_separate_makes_a_row_of_every_turn(chatml: "PreTrainedTokenizerFast") -> None:
    assert learnt_runs(chatml, THREE, turns="separate") == [["Blue<|im_end|>"], ["Red<|im_end|>"], ["Green<|im_end|>"]]
    assert notes(chatml, THREE, turns="separate") == [("turns_separated",)] * 3
    assert notes(chatml, PAIR, turns="separate") == [()]


def test_separate_rows_are_rendered_as_generation_sees_them(qwen3: "PreTrainedTokenizerFast") -> None:
    (rows,) = learn(qwen3, THREE, turns="separate")
    assert isinstance(rows, tuple)
    for number, row in enumerate(rows):
        prompt = qwen3.apply_chat_template(THREE[: 2 * number + 1], tokenize=False, add_generation_prompt=True)
        assert shown(qwen3, row).startswith(f"{prompt}[[<think>\n\n</think>\n\n{THREE[2 * number + 1]['content']}")


def test_rewritten_earlier_turns_leave_the_last(qwen3: "PreTrainedTokenizerFast") -> None:
    assert learnt_runs(qwen3, THREE) == [["<think>\n\n</think>\n\nGreen<|im_end|>"]]
    assert notes(qwen3, THREE) == [("last_turn_only",)]


def test_all_skips_chats_whose_turns_are_rewritten(qwen3: "PreTrainedTokenizerFast") -> None:
    assert learn(qwen3, THREE, turns="all") == ["earlier turns rewritten by the chat template"]


@pytest.mark.parametrize("end", ["<|im_end|>", "</a>"])
def test_turns_that_end_otherwise_earlier_are_not_learnt(end: str) -> None:
    tokenizer = byte_level(
        chat_template="{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
        f"{{% if m.role == 'assistant' and loop.last %}}{end}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.add_tokens(["</a>"])
    assert learnt_runs(tokenizer, THREE) == [[f"Green{end}"]]
    assert notes(tokenizer, THREE) == [("last_turn_only",)]


@pytest.mark.parametrize("key", ["weight", "train", "training", "train_turn", "loss"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_an_excluded_turn_is_not_learnt(chatml: "PreTrainedTokenizerFast", key: str, value: object) -> None:
    chat = with_keys(3, **{key: value})
    assert learnt_runs(chatml, chat) == [["Blue<|im_end|>", "Green<|im_end|>"]]
    assert notes(chatml, chat) == [("excluded_turns",)]


@pytest.mark.parametrize("value", [1, True, 1.0, None])
def test_a_turn_with_weight_one_is_learnt(chatml: "PreTrainedTokenizerFast", value: object) -> None:
    assert learnt_runs(chatml, with_keys(3, weight=value)) == learnt_runs(chatml, THREE)


@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "false", [0]])
def test_other_weights_are_refused(chatml: "PreTrainedTokenizerFast", value: object) -> None:
    assert "message 4 has weight" in refusal(chatml, with_keys(3, weight=value))


def test_contradicting_and_partial_wishes_are_refused(chatml: "PreTrainedTokenizerFast") -> None:
    assert "contradicting keys: weight, train" in refusal(chatml, with_keys(3, weight=1, train=False))
    assert "message 4 has train_detail" in refusal(chatml, with_keys(3, train_detail=[{"begin_offset": 0}]))


def test_a_question_cannot_be_learnt(chatml: "PreTrainedTokenizerFast") -> None:
    assert "only the assistant's turns can be learnt" in refusal(chatml, with_keys(2, train=True))
    assert learnt_runs(chatml, with_keys(2, train=False)) == learnt_runs(chatml, with_keys(2, weight=1))


def test_weights_never_reach_the_template() -> None:
    tokenizer = byte_level(
        chat_template="{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}?{% endif %}"
    )
    (found,) = learn(tokenizer, with_keys(5, weight=1, train=True), loss_on="all")
    assert isinstance(found, tuple)
    assert "weight" not in shown(tokenizer, found[0])


def test_excluded_last_turns_are_left_out_and_noted(chatml: "PreTrainedTokenizerFast") -> None:
    (found,) = learn(chatml, with_keys(5, weight=0))
    assert isinstance(found, tuple)
    assert "Green" not in shown(chatml, found[0])
    assert found[0].notes == ("excluded_turns", "end_left_out")


def test_a_chat_without_a_learnt_turn_is_skipped(chatml: "PreTrainedTokenizerFast") -> None:
    excluded = [PAIR[0], PAIR[1] | {"weight": 0}]
    assert learn(chatml, excluded, messages(("u", "One?"))) == ["without a token to learn"] * 2


def test_an_excluded_turn_contradicts_a_loss_on_all(chatml: "PreTrainedTokenizerFast") -> None:
    assert "data.loss_on: all learns every token" in refusal(chatml, with_keys(3, weight=0), loss_on="all")


@pytest.mark.parametrize("content", ["", " \n", None])
def test_an_empty_turn_is_not_learnt_as_silence(chatml: "PreTrainedTokenizerFast", content: object) -> None:
    empty = {"role": "assistant", "content": content}
    assert learn(chatml, [PAIR[0], empty]) == ["chats whose turns of the assistant are empty"]
    mixed = [PAIR[0], empty, *PAIR]
    assert learnt_runs(chatml, mixed) == [["Blue<|im_end|>"]]
    assert notes(chatml, mixed) == [("empty_turns",)]


def test_an_empty_turn_with_tool_calls_is_learnt() -> None:
    tokenizer = PUBLIC_TEMPLATES["qwen2.5"].tokenizer()
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    for content in ({}, {"content": None}, {"content": ""}):
        chat = [PAIR[0], {"role": "assistant", **content, "tool_calls": [call]}]
        expected = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>'
        assert learnt_runs(tokenizer, chat) == [[expected]]


def test_turns_with_a_loss_on_all_are_refused(chatml: "PreTrainedTokenizerFast") -> None:
    with pytest.raises(ValueError, match=r"data\.turns: last: with data\.loss_on: all"):
        learn(chatml, PAIR, loss_on="all", turns="last")
