"""The shapes of public data sets are recognised by themselves, and what is ambiguous is refused with the choice."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas
import pytest

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow
from loragrid.data.files.sources import open_train_rows
from loragrid.data.shapes.conversions import ALPACA_PROMPT_WITH_INPUT, Canonical
from loragrid.data.shapes.recognition import Shape, recognise
from loragrid.trials.skip_reasons import EXCLUDED

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
CHAT = [USER, ASSISTANT]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
PAIR = {"prompt": "a", "completion": "b"}


class Recognised(Protocol):
    """Writes rows to a file, recognises their shape, and returns it with the canonical rows."""

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], suffix: str = ".jsonl", **keys: Any
    ) -> tuple[Shape, list[Canonical]]: ...


@pytest.fixture
def recognised(tmp_path: Path) -> Recognised:
    def run(rows: Sequence[Mapping[str, Any]], suffix: str = ".jsonl", **keys: Any) -> tuple[Shape, list[Canonical]]:
        path = tmp_path / f"rows{suffix}"
        frame = pandas.DataFrame(rows)
        if suffix == ".parquet":
            frame.to_parquet(path)
        elif suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        data = DataConfig(name=str(path), **keys)
        source = open_train_rows(data)
        shape = recognise(source, data)
        read = source.read(range(source.num_rows))
        return shape, [shape.canonical(row) for row in read if not isinstance(row, BadRow)]

    return run


def fault(row: Canonical) -> str:
    assert isinstance(row, BadRow), row
    return f"{row.column}: {row.what}"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        *(("prompt", "completion"), ("question", "answer"), ("instruction", "response"), ("input", "output")),
        *(("query", "response"), ("problem", "solution"), ("prompt", "response")),
    ],
)
def test_questions_and_answers_are_pairs(recognised: Recognised, question: str, answer: str) -> None:
    shape, rows = recognised([{question: "a", answer: "b", "id": "7"}])
    assert rows == [PAIR]
    assert shape.described == f"{question} and {answer} ({question}, {answer}); not used: id"
    assert shape.own_name("completion") == answer


def test_alpaca_gets_its_published_prompt(recognised: Recognised) -> None:
    given = {"instruction": "Say {input}", "input": "{instruction}", "output": "yes"}
    shape, rows = recognised([given, given | {"input": ""}, given | {"instruction": None}])
    assert shape.name == "alpaca"
    with_input = ALPACA_PROMPT_WITH_INPUT.split("{instruction}")
    after = with_input[1].split("{input}")
    whole = f"{with_input[0]}Say {{input}}{after[0]}{{instruction}}{after[1]}"
    assert rows[0] == {"prompt": whole, "completion": "yes"}
    assert isinstance(rows[1], dict)
    assert "### Input" not in rows[1]["prompt"]
    assert rows[1]["prompt"].endswith("### Instruction:\nSay {input}\n\n### Response:\n")
    assert rows[2] == {"prompt": None, "completion": "yes"}


def test_alpaca_with_system_and_history_is_a_chat(recognised: Recognised) -> None:
    given = {"instruction": "Do", "input": "this", "output": "yes", "system": "Be brief.", "history": [["a", "b"]]}
    shape, rows = recognised([given])
    said = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "Do\nthis"), ("assistant", "yes")]
    assert rows == [{"messages": [{"role": role, "content": text} for role, text in said], "system_first": True}]
    assert shape.name == "alpaca_chat"
    (chosen,) = recognised([{"instruction": "Do", "output": "yes"}], shape="alpaca_chat")[1]
    assert chosen == {"messages": [{"role": "user", "content": "Do"}, {"role": "assistant", "content": "yes"}]}


def test_share_gpt_becomes_messages(recognised: Recognised) -> None:
    turns = [("system", "s"), ("human", "q"), ("function_call", '{"name": "f", "arguments": {"a": 1}}')]
    turns += [("observation", "3"), ("gpt", "a")]
    conversation = [{"from": role, "value": text, "weight": None} for role, text in turns]
    given: dict[str, Any] = {"conversations": conversation, "id": 1, "tools": json.dumps(TOOLS)}
    shape, (row,) = recognised([given])
    assert shape.described == "ShareGPT (conversations, tools); not used: id"
    assert isinstance(row, dict)
    assert row["tools"] == TOOLS
    assert [message["role"] for message in row["messages"]] == [
        "system",
        "user",
        "assistant",
        "observation",
        "assistant",
    ]
    assert row["messages"][2]["tool_calls"] == [CALL]
    assert row["messages"][4] == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tools_go_to_the_rows_that_have_them(recognised: Recognised, suffix: str) -> None:
    _, found = recognised([{"messages": CHAT, "tools": tools} for tools in (TOOLS, None, [])], suffix)
    assert found == [{"messages": CHAT, "tools": TOOLS}, {"messages": CHAT}, {"messages": CHAT}]
    assert fault(recognised([{"messages": CHAT, "tools": "lookup"}])[1][0]) == (
        "tools: 'lookup': not a list of tools, each an object"
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_messages_may_be_json_in_a_text_column(recognised: Recognised, suffix: str) -> None:
    assert recognised([{"messages": json.dumps(CHAT)}], suffix)[1] == [{"messages": CHAT}]
    assert "it is Python, not JSON" in fault(recognised([{"messages": str(CHAT)}], suffix)[1][0])
    twice = '[{"role": "user", "content": "a", "content": "b"}]'
    assert 'has the key "content" more than once' in fault(recognised([{"messages": twice}], suffix)[1][0])


def test_lists_by_key_are_messages(recognised: Recognised) -> None:
    by_key = {"role": ["user", "assistant"], "content": ["hi", "yo"]}
    assert recognised([{"messages": by_key}])[1] == [{"messages": CHAT}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_only_the_completion_of_two_chats_is_learnt(recognised: Recognised, suffix: str) -> None:
    (row,) = recognised([{"prompt": [*CHAT, USER], "completion": [ASSISTANT]}], suffix)[1]
    assert row == {"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT]}


def test_a_system_column_becomes_the_first_message(recognised: Recognised) -> None:
    rows = [{"messages": CHAT, "system": text} for text in ("Be brief.", "", None)]
    rows += [
        {"messages": [{"role": "system", "content": text}, *CHAT], "system": "Be brief."}
        for text in ("Be brief.", "No")
    ]
    found = recognised(rows)[1]
    system = {"role": "system", "content": "Be brief."}
    assert found[:4] == [
        {"messages": [system, *CHAT], "system_first": True},
        {"messages": CHAT},
        {"messages": CHAT},
        {"messages": [system, *CHAT]},
    ]
    assert "the messages begin with another one" in fault(found[4])


@pytest.mark.parametrize("role", ["Assistant", "model", "gpt", "GPT", "bot", "chatgpt", "bard", "AI", " assistant "])
def test_every_name_of_the_assistant_is_learnt(recognised: Recognised, role: str) -> None:
    (row,) = recognised([{"messages": [USER, {"role": role, "content": "yo"}]}])[1]
    assert row == {"messages": CHAT}


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": 3, "content": "a"}, "message 2: role 3: not text"),
        ({"role": "user", "from": "gpt", "content": "a"}, "has role 'user' and from 'gpt'; keep one"),
        ({"content": "a"}, "not a message, which has a role"),
        ("hi", "message 2: 'hi': not a message"),
        ({"role": "assistant", "content": "a", "loss_mask": 0}, "the key loss_mask says what is learnt"),
        ({"role": "user", "content": "a", "images": ["x.png"]}, "the key images holds what is not text"),
        ({"from": "function_call", "value": "f(1)"}, "role function_call: 'f(1)': not JSON"),
        ({"from": "function_call", "value": '{"arguments": {}}'}, "not a call, which has a name and arguments"),
        ({"role": "assistant", "tool_calls": "f(1)"}, "tool_calls 'f(1)': not a list"),
        ({"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [CALL]}, "beside tool_calls"),
    ],
)
def test_a_message_that_would_be_changed_is_refused(recognised: Recognised, message: object, what: str) -> None:
    assert what in fault(recognised([{"messages": [USER, message]}])[1][0])


def test_what_templates_read_is_kept(recognised: Recognised) -> None:
    kept = {"name": "x", "weight": 0, "reasoning_content": "hm", "content": [{"type": "text", "text": "yo"}]}
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    messages.append({"role": "assistant", **kept})
    assert recognised([{"messages": messages}])[1] == [{"messages": messages}]
    older = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    (row,) = recognised([{"messages": [USER, older]}])[1]
    assert row == {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            PAIR | {"text": "c"},
            r"as prompt and completion .* or text \(text\); choose .* data\.shape: prompt_completion",
        ),
        (PAIR | {"messages": CHAT}, r"as messages \(messages\) or prompt and completion"),
        ({"messages": CHAT, "conversations": CHAT}, r"choose one, for example data\.columns: \{messages: messages\}"),
        ({"instruction": "a", "input": "", "output": "b", "text": "c"}, r"as alpaca .* or text .* data\.shape: alpaca"),
        ({"problem": "a", "solution": "b", "answer": "c"}, r"data\.columns: \{prompt: problem, completion: answer\}"),
        (PAIR | {"label": True}, r"without the column label, which may hold what is to be learnt"),
        ({"text": "a", "category": "b"}, r"data\.columns: \{prompt: text, completion: category\}.* data\.shape: text"),
        (PAIR | {"context": "c"}, r"without the column context, which belongs to the prompt"),
        (PAIR | {"tools": TOOLS}, r"without the column tools, which is meant for the chat template"),
        ({"question": "a", "response": "b", "system_prompt": "c"}, r"without the column system_prompt"),
        ({"messages": CHAT, "images": ["x"]}, r"without the column images, which holds what is not text"),
        ({"messages": CHAT, "functions": TOOLS}, r"without the column functions, which is meant for the chat template"),
        (PAIR | {"split": "test"}, r"without the column split, which says to which split"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"not learnt; .*\{prompt: prompt, completion: chosen\}"),
        ({"Question": "a", "Answer": "b"}, r"capital letters count.*\{prompt: Question, completion: Answer\}"),
        ({"a": "b"}, r"has the columns a; allowed: messages, prompt\+completion or text"),
    ],
)
def test_what_is_ambiguous_is_refused_with_the_choice(
    recognised: Recognised, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recognised([row])


def test_the_choice_of_the_user_is_obeyed(recognised: Recognised) -> None:
    row = {"instruction": "a", "output": "b", "text": "c", "label": 1}
    shape, rows = recognised([row], columns={"text": "text"})
    assert rows == [{"text": "c"}]
    assert shape.unused == ("instruction", "output", "label")
    assert recognised([row], columns={"prompt": "instruction", "completion": "output"})[1] == [PAIR]
    assert recognised([row], shape="text")[1] == [{"text": "c"}]
    with pytest.raises(ValueError, match=r"data\.shape: messages: .* has no such rows"):
        recognised([row], shape="messages")
    with pytest.raises(ValueError, match=r"shape: .text.: the columns already say how rows are read"):
        recognised([row], shape="text", columns={"text": "text"})


def test_system_and_tools_may_have_other_names(recognised: Recognised) -> None:
    row = {"chat": CHAT, "functions": TOOLS, "persona": "Be brief.", "tools": "none"}
    columns = {"messages": "chat", "tools": "functions", "system": "persona"}
    shape, (found,) = recognised([row], columns=columns)
    assert found == {
        "messages": [{"role": "system", "content": "Be brief."}, *CHAT],
        "tools": TOOLS,
        "system_first": True,
    }
    assert shape.unused == ("tools",)
    with pytest.raises(ValueError, match=r"data\.columns: text, tools: belong to different kinds of row"):
        recognised([row], columns={"text": "chat", "tools": "functions"})


def test_columns_leave_out_all_others(recognised: Recognised) -> None:
    columns = {"prompt": "prompt", "completion": "completion"}
    shape, rows = recognised([PAIR | {"weight": 2.5, "train": False}], columns=columns)
    assert (rows, shape.unused) == ([PAIR], ("weight", "train"))
    assert shape.described.endswith("not used: weight, train")
    shape, rows = recognised([{"chat": CHAT, "system": "Be brief.", "tools": TOOLS}], columns={"messages": "chat"})
    assert (rows, shape.unused) == ([{"messages": CHAT}], ("system", "tools"))
    both = {"prompt": [USER], "completion": [ASSISTANT], "tools": TOOLS, "weight": 0}
    assert recognised([both], columns=columns)[1] == [{"messages": CHAT}]
    text = {"text": "a", "weight": 0, "label": 1}
    assert recognised([text], columns={"text": "text"})[1] == [{"text": "a"}]


def test_exclusions_may_have_other_names(recognised: Recognised) -> None:
    rows = [PAIR | {"use": flag, "train": True} for flag in (True, False)]
    columns = {"prompt": "prompt", "completion": "completion", "train": "use"}
    shape, found = recognised(rows, columns=columns)
    assert (found, shape.unused) == ([PAIR, EXCLUDED], ("train",))
    assert recognised(rows, columns={"train": "use"})[1] == [PAIR, EXCLUDED]
    assert "use" in shape.described


def test_a_pair_with_a_mapped_system_prompt_is_a_chat(recognised: Recognised) -> None:
    row = {"question": "hi", "response": "yo", "system_prompt": "Be brief."}
    columns = {"prompt": "question", "completion": "response", "system": "system_prompt"}
    shape, rows = recognised([row], columns=columns)
    assert rows == [{"messages": [{"role": "system", "content": "Be brief."}, *CHAT], "system_first": True}]
    assert shape.name == "prompt and completion as a chat"
    tools = PAIR | {"functions": TOOLS}
    (found,) = recognised([tools], columns={"tools": "functions", "prompt": "prompt"})[1]
    assert isinstance(found, dict)
    assert found["tools"] == TOOLS


@pytest.mark.parametrize("row", [{"prompt": [USER], "completion": "yo"}, {"prompt": "hi", "completion": [ASSISTANT]}])
def test_a_chat_beside_text_is_a_fault_of_the_file(recognised: Recognised, row: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"holds messages, and its column \w+ does not; write both as messages, or both"
    ):
        recognised([row, row])


def test_a_table_inside_one_object_is_told_so(recognised: Recognised) -> None:
    for value, remedy in (({"data": [PAIR]}, "array in its key 'data'"), ({"a": [PAIR], "b": [PAIR]}, "keys 'a', 'b'")):
        with pytest.raises(ValueError, match=rf"save the .*{remedy}"):
            recognised([{"version": "1", **value}], ".json")


def test_a_file_without_its_first_line_is_told_so(recognised: Recognised) -> None:
    with pytest.raises(ValueError, match=r"the file lacks its first line with the names of the columns"):
        recognised([{"What is red?": "What is blue?", "A colour": "Another"}], ".csv")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_may_say_that_they_are_not_trained(recognised: Recognised, suffix: str) -> None:
    found = recognised([PAIR | {"weight": weight} for weight in (0, 1)], suffix)[1]
    assert found == [EXCLUDED, PAIR]
    found = recognised([PAIR | {"train": train} for train in (False, True)], suffix)[1]
    assert found == [EXCLUDED, PAIR]
    assert "weight: " in fault(recognised([PAIR | {"weight": 2.5}], suffix)[1][0])


def test_a_column_that_names_conversations_is_no_chat(recognised: Recognised) -> None:
    shape, rows = recognised([PAIR | {"conversation": "7"}])
    assert (rows, shape.unused) == ([PAIR], ("conversation",))
    assert recognised([{"conversation": CHAT}])[1] == [{"messages": CHAT}]
