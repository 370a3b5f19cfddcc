"""Where an answer begins if its template renders the messages before it unlike the prompt of generation."""

from typing import TYPE_CHECKING, Any

import pytest

from loragrid.data.chats.prompts import is_closed
from tests.support.chat_templates import PUBLIC_TEMPLATES, messages
from tests.support.learnt_text import learnt_runs, notes, refusal
from tests.support.tiny_tokenizers import byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
CALL = [{"type": "function", "function": {"name": "lookup", "arguments": {"q": "x"}}}]


def asking(opened: str, turns: str = TURNS) -> "PreTrainedTokenizerFast":
    """ChatML whose generation prompt ends with a text that its answers lack."""
    asked = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + opened + "' }}{% endif %}"
    return byte_level(chat_template=turns + asked)


@pytest.mark.parametrize(
    "block",
    [
        "<think>\n\n</think>\n\n",
        "<|channel>thought\n<channel|>",
        "[THINK][/THINK]",
        "<|START_THINKING|><|END_THINKING|>",
        "◁think▷◁/think▷",
        "<|think_begin|>\n<|think_end|>",
    ],
)
def test_a_block_that_the_prompt_closes_may_be_missing(block: str) -> None:
    chat = messages(("u", "Hi"), ("a", "Blue"), ("u", "And?"), ("a", "Red"))
    tokenizer = asking(block.replace("\n", "\\n"))
    assert learnt_runs(tokenizer, chat, turns="separate") == [["Blue<|im_end|>"], ["Red<|im_end|>"]]
    assert notes(tokenizer, chat) == [("last_turn_only", "prompt_apart")]


@pytest.mark.parametrize("text", ["<think>", "</think>", "<a></b>", "x<a></a>", "<a></a>x", "<a><b></b></a>", "<a><a>"])
def test_other_texts_are_no_closed_block(text: str) -> None:
    assert not is_closed(text)


@pytest.mark.parametrize("question", ["k", "hi", "think", "<", "assistant", "n", "im_end", "\n", "Hi?"])
def test_a_question_may_stand_in_the_templates_own_text(question: str) -> None:
    chat = messages(("u", question), ("a", "Blue"))
    reason = refusal(asking("<think>\\n"), chat)
    assert r"generation prompt ends with '<think>\n', which the rendered answer lacks" in reason
    assert learnt_runs(asking("<think>\\n\\n</think>\\n\\n"), chat) == [["Blue<|im_end|>"]]


def test_an_earlier_answer_may_stand_in_the_templates_own_text() -> None:
    tokenizer = PUBLIC_TEMPLATES["qwen3"].tokenizer()
    for said in ("hi", "hello", "think", "n"):
        chat = messages(("u", "Hi"), ("a", said), ("a", "Blue"))
        assert learnt_runs(tokenizer, chat, turns="last") == [["<think>\n\n</think>\n\nBlue<|im_end|>"]]


def test_white_space_alone_is_a_reason_that_is_shown() -> None:
    turns = TURNS.replace("+ m.content", "+ ('<think></think>' if m.role == 'assistant' else '') + m.content")
    reason = refusal(asking("<think>\\n", turns), messages(("u", "Hi"), ("a", "Blue")))
    assert r"ends with '<think>\n', but the rendered answer goes on with '<think></think>'" in reason


def called(**keys: Any) -> list[dict[str, Any]]:
    turn = {"role": "assistant", "tool_calls": CALL, **keys}
    return [*messages(("u", "Hi")), turn, *messages(("t", "0"), ("a", "Blue"))]


@pytest.mark.parametrize("turns", ["auto", "all", "separate"])
@pytest.mark.parametrize(
    ("name", "keys", "reason"),
    [
        ("llama3.1", {"content": "Let me see."}, "leaves out content of message 2"),
        ("harmony", {"content": "Let me see."}, "leaves out content of message 2"),
        ("qwen2.5", {"content": "", "reasoning_content": "hm"}, "leaves out reasoning of message 2"),
        ("harmony", {"tool_calls": [*CALL, *CALL]}, "leaves out the name of a tool call of message 2"),
        ("mistral_nemo", {"content": "See.", "tool_calls": [CALL[0] | {"id": "abcdefghi"}]}, "content of message 2"),
    ],
)
def test_a_part_of_an_earlier_turn_is_never_lost(turns: str, name: str, keys: Any, reason: str) -> None:
    tokenizer = PUBLIC_TEMPLATES[name].tokenizer()
    assert reason in refusal(tokenizer, called(**keys), turns=turns)
    assert learnt_runs(tokenizer, called(**keys), turns="last")[0][-1][:4] in ("Blue", "<|ch")


@pytest.mark.parametrize("name", ["llama3.1", "zephyr", "chatml"])
def test_earlier_reasoning_is_never_lost(name: str) -> None:
    chat = messages(("u", "Hi"), ("a", "Blue"), ("u", "And?"), ("a", "Red"))
    chat[1]["reasoning_content"] = "hm"
    reason = refusal(PUBLIC_TEMPLATES[name].tokenizer(), chat)
    assert "leaves out reasoning of message 2" in reason
    assert "data.turns: last learns the last turn only" in reason


def test_earlier_turns_without_the_opened_reasoning_are_noted() -> None:
    tokenizer = asking("<think>\\n")
    chat = messages(("u", "Hi"), ("a", "Blue"), ("u", "And?"), ("a", "<think>\nhm\n</think>\nRed"))
    assert learnt_runs(tokenizer, chat) == [["hm\n</think>\nRed<|im_end|>"]]
    assert notes(tokenizer, chat) == [("earlier_turns_apart",)]
    assert "which the rendered answer lacks" in refusal(tokenizer, chat, turns="all")
