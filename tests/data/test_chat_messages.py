"""How messages and tools of public data sets reach a chat template."""

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat_templates import PUBLIC_TEMPLATES, messages
from tests.support.learnt_text import learn, learnt_runs, notes, refusal, shown
from tests.support.tiny_tokenizers import byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUESTION = messages(("u", "Hi"))
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
NAME_ONLY = (
    "{% if tools %}{{ 'Tools: ' + (tools | tojson) }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASKED
)
TOOL = {"name": "lookup", "description": "finds", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def chatml() -> "PreTrainedTokenizerFast":
    return byte_level()


@pytest.fixture(scope="module")
def qwen() -> "PreTrainedTokenizerFast":
    return PUBLIC_TEMPLATES["qwen2.5"].tokenizer()


def called(call: Any, **keys: Any) -> list[dict[str, Any]]:
    return [*QUESTION, {"role": "assistant", "tool_calls": [call], **keys}]


def text_of(tokenizer: "PreTrainedTokenizerFast", row: Any, **keys: Any) -> str:
    (found,) = learn(tokenizer, row, **keys)
    assert isinstance(found, tuple), found
    return shown(tokenizer, found[0])


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_absent_content_beside_tool_calls_is_no_fault(content: dict[str, Any]) -> None:
    tokenizer = byte_level(chat_template=NAME_ONLY)
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"q": "x"}}}
    chat = [*called(call, **content), {"role": "tool", "content": "0"}, *messages(("a", "It is 0"))]
    assert learnt_runs(tokenizer, chat) == [["<call>lookup</call><|im_end|>", "It is 0<|im_end|>"]]
    assert notes(tokenizer, chat) == [("arguments_not_rendered",)]


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": {"name": "lookup", "arguments": {"q": "x"}}},
        {"id": "1", "type": "function", "function": {"name": "lookup", "arguments": '{"q":"x"}'}},
        {"name": "lookup", "arguments": {"q": "x"}},
        {"function": {"name": "lookup", "arguments": {"q": "x", "unused": None}}},
    ],
    ids=["mapping", "JSON", "bare", "null argument"],
)
def test_forms_of_tool_calls_train_the_same(qwen: "PreTrainedTokenizerFast", call: dict[str, Any]) -> None:
    expected = '<tool_call>\n{"name": "lookup", "arguments": {"q": "x"}}\n</tool_call><|im_end|>'
    assert learnt_runs(qwen, called(call)) == [[expected]]


def test_the_older_function_call_is_one_tool_call(qwen: "PreTrainedTokenizerFast") -> None:
    chat = [
        *QUESTION,
        {"role": "assistant", "content": None, "function_call": {"name": "lookup", "arguments": "{}"}},
        {"role": "function", "name": "lookup", "content": "0"},
        *messages(("a", "Zero")),
    ]
    expected = ['<tool_call>\n{"name": "lookup", "arguments": {}}\n</tool_call><|im_end|>', "Zero<|im_end|>"]
    assert learnt_runs(qwen, chat) == [expected]


@pytest.mark.parametrize("arguments", ["{q: 1}", "[1]", 5])
def test_arguments_that_are_no_object_are_refused(qwen: "PreTrainedTokenizerFast", arguments: object) -> None:
    assert "message 2 calls lookup with" in refusal(
        qwen, called({"function": {"name": "lookup", "arguments": arguments}})
    )


@pytest.mark.parametrize("call", [{}, "lookup", {"function": {"arguments": "{}"}}, {"function": {"name": ""}}])
def test_a_tool_call_without_a_name_is_refused(qwen: "PreTrainedTokenizerFast", call: object) -> None:
    assert "without the name of a function" in refusal(qwen, called(call))


def test_a_template_without_tool_calls_refuses_them(chatml: "PreTrainedTokenizerFast") -> None:
    call = {"function": {"name": "lookup", "arguments": {}}}
    assert "does not render tool_calls" in refusal(chatml, called(call))


@pytest.mark.parametrize("writes", ["c.function.arguments | string", "c.function.arguments | string | tojson"])
def test_arguments_written_otherwise_are_refused_or_given_as_text(writes: str) -> None:
    template = NAME_ONLY.replace("c.function.name", "c.function.name + ' ' + (" + writes + ")")
    tokenizer = byte_level(chat_template=template)
    chat = called({"function": {"name": "lookup", "arguments": {"q": "x"}}})
    if writes.endswith("tojson"):
        assert "does not write the arguments of tool calls as JSON" in refusal(tokenizer, chat)
    else:
        assert learnt_runs(tokenizer, chat) == [['<call>lookup {"q": "x"}</call><|im_end|>']]


@pytest.mark.parametrize(
    ("writes", "learnt"),
    [
        ("k + '=' + \"'\" + v + \"'\"", "lookup(q='x', to='y z')"),
        ("k + '=' + (v | tojson)", 'lookup(q="x", to="y z")'),
        ("k + ' = ' + (v | tojson)", 'lookup(q = "x", to = "y z")'),
    ],
)
def test_a_call_as_python_writes_it_is_learnt(writes: str, learnt: str) -> None:
    values = "{% for k, v in c.function.arguments.items() %}{{ (', ' if not loop.first else '') + " + writes + " }}"
    template = NAME_ONLY.replace("'</call>' }}", "'(' }}" + values + "{% endfor %}{{ ')</call>' }}")
    chat = called({"function": {"name": "lookup", "arguments": '{"q": "x", "to": "y z"}'}})
    assert learnt_runs(byte_level(chat_template=template), chat) == [[f"<call>{learnt}</call><|im_end|>"]]


@pytest.mark.parametrize("value", [[{"type": "function", "function": TOOL}], [TOOL]], ids=["wrapped", "bare"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_reach_the_template(qwen: "PreTrainedTokenizerFast", value: list[Any], as_text: bool) -> None:
    row = {"messages": messages(("u", "Hi"), ("a", "Blue")), "tools": json.dumps(value) if as_text else value}
    assert '{"type": "function", "function": {"name": "lookup", "description": "finds"' in text_of(qwen, row)
    assert notes(qwen, row) == [("tools_wrapped",) if value == [TOOL] else ()]


@pytest.mark.parametrize("value", [None, [], "", "[]", "null"])
def test_absent_tools_are_none(chatml: "PreTrainedTokenizerFast", value: object) -> None:
    row = {"messages": messages(("u", "Hi"), ("a", "Blue")), "tools": value}
    assert learnt_runs(chatml, row) == [["Blue<|im_end|>"]]


@pytest.mark.parametrize("value", ["no json", "{}x", [1], ["lookup"], [{}], {"name": "lookup"}, 5])
def test_tools_of_another_form_are_refused(qwen: "PreTrainedTokenizerFast", value: object) -> None:
    row = {"messages": messages(("u", "Hi"), ("a", "Blue")), "tools": value}
    (found,) = learn(qwen, row)
    assert getattr(found, "column", None) == "tools"


def test_named_tool_templates_are_used_for_rows_with_tools() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": PUBLIC_TEMPLATES["chatml"].text, "tool_use": NAME_ONLY}
    plain = messages(("u", "Hi"), ("a", "Blue"))
    first, second = learn(tokenizer, {"messages": plain, "tools": [TOOL]}, plain)
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    assert shown(tokenizer, first[0]).startswith("Tools: ")
    assert shown(tokenizer, second[0]).startswith("<|im_start|>user")


def test_text_parts_are_joined_or_passed_on(chatml: "PreTrainedTokenizerFast") -> None:
    parts = [{"type": "text", "text": "Bl"}, {"type": "text", "text": "ue"}]
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": parts}]
    assert learnt_runs(chatml, chat) == [["Blue<|im_end|>"]]
    gemma = PUBLIC_TEMPLATES["gemma3"].tokenizer()
    assert learnt_runs(gemma, chat) == [["Blue<end_of_turn>"]]


def test_templates_that_need_parts_get_parts() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASKED
    )
    tokenizer = byte_level(chat_template=template)
    assert learnt_runs(tokenizer, messages(("u", "Hi"), ("a", "Blue"))) == [["Blue<|im_end|>"]]


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video", "file"])
def test_parts_other_than_text_are_refused(chatml: "PreTrainedTokenizerFast", kind: str) -> None:
    chat = [{"role": "user", "content": [{"type": kind, kind: "x"}]}, *messages(("a", "Blue"))]
    assert f"message 1 has a part of the type '{kind}'" in refusal(chatml, chat)


def test_a_developer_message_is_a_system_message(chatml: "PreTrainedTokenizerFast") -> None:
    chat = messages(("developer", "Be brief."), ("u", "Hi"), ("a", "Blue"))
    assert text_of(chatml, chat).startswith("<|im_start|>system\nBe brief.")
    assert notes(chatml, chat) == [("developer_as_system",)]
    harmony = PUBLIC_TEMPLATES["harmony"].tokenizer()
    assert "<|start|>developer<|message|># Instructions\n\nBe brief." in text_of(harmony, chat)


@pytest.mark.parametrize("role", ["asistant", "narrator", ""])
def test_unknown_roles_are_refused(chatml: "PreTrainedTokenizerFast", role: str) -> None:
    assert "unknown role" in refusal(chatml, messages(("u", "Hi"), (role, "Blue")))


def test_roles_that_the_template_names_are_passed_on() -> None:
    template = "{% if messages[0].role == 'observation' %}{% endif %}" + str(byte_level().chat_template)
    tokenizer = byte_level(chat_template=template)
    assert "observation" in text_of(tokenizer, messages(("u", "Hi"), ("observation", "0"), ("a", "Blue")))


@pytest.mark.parametrize(
    "message",
    [5, "Blue", {"content": "Blue"}, {"role": 1, "content": "Blue"}, {"role": "user", "content": 5}, {"role": "user"}],
)
def test_what_is_no_message_is_refused(chatml: "PreTrainedTokenizerFast", message: object) -> None:
    assert refusal(chatml, [message, *messages(("a", "Blue"))])


@pytest.mark.parametrize("value", ["text", {"role": "user"}, 5])
def test_messages_that_are_no_list_are_refused(chatml: "PreTrainedTokenizerFast", value: object) -> None:
    assert "not a list of messages" in refusal(chatml, {"messages": value})


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_key_of_any_message_that_no_template_reads_is_noted(chatml: "PreTrainedTokenizerFast", number: int) -> None:
    chat = messages(("u", "Hi"), ("a", "Blue"), ("u", "And?"), ("a", "Red"))
    chat[number] |= {"prefix": True, "id": ""}
    for turns in ("auto", "last"):
        assert notes(chatml, chat, turns=turns) == [("keys_not_rendered",)]
    read = str(chatml.chat_template).replace("m['content']", "m['content'] + ('!' if m.prefix else '')")
    assert notes(byte_level(chat_template=read), chat, turns="last") == [()]


def test_keys_that_no_template_reads_are_noted(chatml: "PreTrainedTokenizerFast") -> None:
    chat = [{"role": "user", "content": "Hi", "name": "Ann", "id": None}, *messages(("a", "Blue"))]
    assert notes(chatml, chat) == [("keys_not_rendered",)]
    rendered = byte_level(chat_template=str(chatml.chat_template).replace("m['role']", "m['role'] + (m.name or '')"))
    assert notes(rendered, chat) == [()]


def test_lone_surrogates_are_refused(chatml: "PreTrainedTokenizerFast") -> None:
    assert "lone surrogates" in refusal(chatml, messages(("u", "\ud800"), ("a", "Blue")))


def test_a_fault_says_that_the_system_column_is_counted(chatml: "PreTrainedTokenizerFast") -> None:
    chat = messages(("s", "Be brief."), ("u", "Hi"), ("a", "Blue"))
    chat[2]["weight"] = 5
    assert refusal(chatml, {"messages": chat, "system_first": True}).endswith(
        "message 3 has weight: 5; allowed: 0 or false, 1 or true (message 1 is the row's column of system prompts)"
    )
    assert "column of system prompts" not in refusal(chatml, {"messages": chat})
