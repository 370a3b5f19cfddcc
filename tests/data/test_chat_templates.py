"""Of every public template's structure, exactly the assistant's part and its end is learnt."""

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat_templates import PUBLIC_TEMPLATES, messages
from tests.support.learnt_text import learnt_runs, notes, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TWO_TURNS = messages(("u", "Hi"), ("a", "Blue"), ("u", "And?"), ("a", "Red"))
WITH_SYSTEM = messages(("s", "Be brief."), ("u", "Hi"), ("a", "Blue"))
ASSISTANT_FIRST = messages(("a", "Hello"), ("u", "Hi"), ("a", "Blue"))
SPACED = messages(("u", "Hi"), ("a", "\n Blue sea \n"))
REASONED = messages(("u", "Hi"), ("a", "<think>\nhm\n</think>\n\nBlue"))

LEARNT: dict[str, tuple[list[str], str]] = {
    "chatml": (["Blue<|im_end|>", "Red<|im_end|>"], "\n Blue sea \n<|im_end|>"),
    "qwen2.5": (["Blue<|im_end|>", "Red<|im_end|>"], "\n Blue sea \n<|im_end|>"),
    "qwen3": (["<think>\n\n</think>\n\nRed<|im_end|>"], "<think>\n\n</think>\n\n Blue sea \n<|im_end|>"),
    "qwen3_thinking": (["\n</think>\n\nRed<|im_end|>"], "\n</think>\n\n Blue sea \n<|im_end|>"),
    "llama2": ([" Blue </s>", " Red </s>"], " Blue sea </s>"),
    "llama3": (["Blue<|eot_id|>", "Red<|eot_id|>"], "Blue sea<|eot_id|>"),
    "llama3_always": (["Blue<|eot_id|>", "Red<|eot_id|>"], "Blue sea<|eot_id|>"),
    "llama3.1": (["Blue<|eot_id|>", "Red<|eot_id|>"], "Blue sea<|eot_id|>"),
    "mistral_nemo": (["Blue</s>", "Red</s>"], "\n Blue sea \n</s>"),
    "gemma2": (["Blue<end_of_turn>", "Red<end_of_turn>"], "Blue sea<end_of_turn>"),
    "gemma3": (["Blue<end_of_turn>", "Red<end_of_turn>"], "Blue sea<end_of_turn>"),
    "phi3": (["Blue<|end|>", "Red<|end|>"], "\n Blue sea \n<|end|>"),
    "zephyr": (["\nBlue</s>", "\nRed</s>"], "\n\n Blue sea \n</s>"),
    "deepseek_v3": (["Blue<｜end▁of▁sentence｜>", "Red<｜end▁of▁sentence｜>"], "\n Blue sea \n<｜end▁of▁sentence｜>"),
    "harmony": (["<|channel|>final<|message|>Red<|return|>"], "<|channel|>final<|message|>\n Blue sea \n<|return|>"),
    "command_r": (["Blue<|END_OF_TURN_TOKEN|>", "Red<|END_OF_TURN_TOKEN|>"], "Blue sea<|END_OF_TURN_TOKEN|>"),
    "command_r7b": (
        [f"<|START_RESPONSE|>{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for text in ("Blue", "Red")],
        "<|START_RESPONSE|>Blue sea<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    "granite": (["Blue<|end_of_text|>", "Red<|end_of_text|>"], "\n Blue sea \n<|end_of_text|>"),
    "smollm3": (["Blue<|im_end|>", "Red<|im_end|>"], " Blue sea \n<|im_end|>"),
    "olmo2": (["Blue<|endoftext|>", "Red<|endoftext|>"], "\n Blue sea \n<|endoftext|>"),
    "vicuna": ([" Blue</s>", " Red</s>"], " Blue sea</s>"),
    "alpaca": (["Blue\n\n", "Red\n\n"], "\n Blue sea \n\n\n"),
    "xml_tools": (["Blue<|im_end|>", "Red<|im_end|>"], "\n Blue sea \n<|im_end|>"),
}
"""Template -> what is learnt of `TWO_TURNS` and of `SPACED`."""

REFUSES_SYSTEM = {"gemma2"}
REFUSES_ASSISTANT_FIRST = {"gemma2", "llama2"}
CALL = [{"id": "abcdefghi", "type": "function", "function": {"name": "lookup", "arguments": {"q": 'say "x"'}}}]
TOOLS = [{"type": "function", "function": {"name": "lookup", "description": "finds", "parameters": {"type": "object"}}}]
CALLED: dict[str, list[str]] = {
    "qwen2.5": [
        '<tool_call>\n{"name": "lookup", "arguments": {"q": "say \\"x\\""}}\n</tool_call><|im_end|>',
        "0<|im_end|>",
    ],
    "llama3.1": ['{"name": "lookup", "parameters": {"q": "say \\"x\\""}}<|eot_id|>', "0<|eot_id|>"],
    "mistral_nemo": [
        '[TOOL_CALLS][{"name": "lookup", "arguments": {"q": "say \\"x\\""}, "id": "abcdefghi"}]</s>',
        "0</s>",
    ],
    "deepseek_v3": [
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>lookup\n```json\n{"q": "say \\"x\\""}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
        "0<｜end▁of▁sentence｜>",
    ],
    "harmony": [
        ' to=functions.lookup<|channel|>commentary json<|message|>{"q": "say \\"x\\""}<|call|>',
        "<|channel|>final<|message|>0<|return|>",
    ],
    "xml_tools": [
        '<tool_call>\n<function=lookup>\n<parameter=q>\nsay "x"\n</parameter>\n</function>\n</tool_call><|im_end|>',
        "0<|im_end|>",
    ],
}
"""Template -> what is learnt of a tool call and of the answer to its result."""


@cache
def tokenizer_of(name: str) -> "PreTrainedTokenizerFast":
    return PUBLIC_TEMPLATES[name].tokenizer()


def called(arguments: Any) -> list[dict[str, Any]]:
    call = {**CALL[0], "function": {"name": "lookup", "arguments": arguments}}
    return [
        *messages(("u", "Hi")),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "zero", "tool_call_id": "abcdefghi", "name": "lookup"},
        *messages(("a", "0")),
    ]


@pytest.mark.parametrize("name", LEARNT)
def test_answers_and_their_ends_are_learnt(name: str) -> None:
    assert learnt_runs(tokenizer_of(name), TWO_TURNS) == [LEARNT[name][0]]


@pytest.mark.parametrize("name", LEARNT)
def test_white_space_is_learnt_as_the_template_writes_it(name: str) -> None:
    assert learnt_runs(tokenizer_of(name), SPACED) == [[LEARNT[name][1]]]


@pytest.mark.parametrize("name", sorted(set(LEARNT) - REFUSES_SYSTEM))
def test_a_system_prompt_is_never_learnt(name: str) -> None:
    last = LEARNT[name][0][-1].replace("Red", "Blue")
    assert learnt_runs(tokenizer_of(name), WITH_SYSTEM) == [[last]]


@pytest.mark.parametrize("name", sorted(set(LEARNT) - REFUSES_ASSISTANT_FIRST))
def test_a_chat_that_begins_with_the_assistant_learns_its_answers(name: str) -> None:
    (found,) = learnt_runs(tokenizer_of(name), ASSISTANT_FIRST)
    last = LEARNT[name][0][-1].replace("Red", "Blue")
    greeting = LEARNT[name][0][0].replace("Blue", "Hello")
    if name == "qwen3":  # writes no reasoning before the first question
        assert found == ["Hello<|im_end|>", last]
    elif len(LEARNT[name][0]) == 1:
        assert found == [last]
    else:
        assert found == [greeting, last]


@pytest.mark.parametrize(("name", "reason"), [("gemma2", "roles must alternate"), ("llama2", "roles must alternate")])
def test_a_templates_own_refusal_is_passed_on(name: str, reason: str) -> None:
    assert reason in refusal(tokenizer_of(name), ASSISTANT_FIRST)


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("arguments", [{"q": 'say "x"'}, '{"q": "say \\"x\\""}'], ids=["mapping", "JSON"])
def test_tool_calls_are_learnt_with_arguments_written_once(name: str, arguments: Any) -> None:
    found = [run for row in learnt_runs(tokenizer_of(name), called(arguments), turns="separate") for run in row]
    assert found == CALLED[name]


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "mistral_nemo", "granite", "xml_tools"])
def test_tools_reach_templates_that_render_them(name: str) -> None:
    (plain,) = learnt_runs(tokenizer_of(name), messages(("u", "Hi"), ("a", "Blue")))
    row = {"messages": messages(("u", "Hi"), ("a", "Blue")), "tools": TOOLS}
    assert learnt_runs(tokenizer_of(name), row) == [plain]


@pytest.mark.parametrize("name", ["chatml", "gemma2", "alpaca", "llama3"])
def test_tools_that_a_template_ignores_are_refused(name: str) -> None:
    row = {"messages": messages(("u", "Hi"), ("a", "Blue")), "tools": TOOLS}
    assert "does not render the tool lookup" in refusal(tokenizer_of(name), row)


def test_reasoning_is_learnt_where_the_template_keeps_it() -> None:
    assert learnt_runs(tokenizer_of("qwen3"), REASONED) == [["<think>\nhm\n</think>\n\nBlue<|im_end|>"]]
    assert learnt_runs(tokenizer_of("chatml"), REASONED) == [["<think>\nhm\n</think>\n\nBlue<|im_end|>"]]


def test_reasoning_without_an_answer_is_learnt_with_its_end() -> None:
    chat = messages(("u", "Hi"), ("a", "<think>\nhm\n</think>\n\n"))
    assert learnt_runs(tokenizer_of("qwen3"), chat) == [["<think>\nhm\n</think>\n\n<|im_end|>"]]


def test_reasoning_starts_behind_what_the_prompt_opens() -> None:
    assert learnt_runs(tokenizer_of("qwen3_thinking"), REASONED) == [["hm\n</think>\n\nBlue<|im_end|>"]]


def test_reasoning_in_a_key_of_its_own_is_learnt() -> None:
    reasoned = [*messages(("u", "Hi")), {"role": "assistant", "content": "Blue", "reasoning_content": "hm"}]
    assert learnt_runs(tokenizer_of("qwen3"), reasoned) == [["<think>\nhm\n</think>\n\nBlue<|im_end|>"]]
    thought = [*messages(("u", "Hi")), {"role": "assistant", "content": "Blue", "reasoning": "hm"}]
    assert learnt_runs(tokenizer_of("qwen3"), thought) == [["<think>\nhm\n</think>\n\nBlue<|im_end|>"]]


def test_reasoning_that_the_template_drops_is_refused() -> None:
    reasoned = [*messages(("u", "Hi")), {"role": "assistant", "content": "Blue", "reasoning_content": "hm"}]
    assert "leaves out reasoning of message 2" in refusal(tokenizer_of("chatml"), reasoned)
    assert "leaves out content after <think> of message 2" in refusal(tokenizer_of("r1"), REASONED)


def test_an_answer_without_the_opened_reasoning_is_refused() -> None:
    reason = refusal(tokenizer_of("r1"), WITH_SYSTEM)
    assert r"generation prompt ends with '<think>\n', which the rendered answer lacks" in reason


def test_a_prompt_that_answers_change_is_learnt_from_and_noted() -> None:
    assert notes(tokenizer_of("mistral_nemo"), WITH_SYSTEM) == [("prompt_apart",)]


def test_turns_without_an_end_token_are_noted() -> None:
    assert notes(tokenizer_of("alpaca"), WITH_SYSTEM) == [("turn_not_ended",)]
