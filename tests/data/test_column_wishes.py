"""A column that says how rows are meant is never left out in silence, and the remedy does what it says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from loragrid.config.experiment import DataConfig
from loragrid.data.files.sources import open_train_rows
from loragrid.data.shapes.recognition import Shape, recognise

PAIR = {"question": "q", "answer": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TEXT = {"text": "t"}
SCHEMA = {"type": "function", "function": {"name": "f"}}


def read(folder: Path, *rows: Mapping[str, Any], **keys: Any) -> Shape:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    data = DataConfig(name=str(path), **keys)
    return recognise(open_train_rows(data), data)


WISHES: list[tuple[dict[str, Any], str]] = [
    (TEXT | {"role": "user"}, "role, which says who speaks"),
    (TEXT | {"who": "prompter"}, "who, which says who speaks"),
    (TEXT | {"Speaker": "Ann"}, "Speaker, which says who speaks"),
    (TEXT | {"conversation_id": 3}, "conversation_id, which says that rows are parts"),
    (TEXT | {"parent_id": None}, "parent_id, which says that rows are parts"),
    (TEXT | {"answer": "reject"}, "answer, which says which rows are good"),
    (TEXT | {"_status": "accept"}, "_status, which says which rows are good"),
    (TEXT | {"answer": "Paris"}, "answer, which may hold what is to be learnt"),
    (TEXT | {"summary": "s"}, "summary, which may hold what is to be learnt"),
    (TEXT | {"prompt": "p"}, "prompt, which may be the prompt of the text"),
    (PAIR | {"turn_id": 2}, "turn_id, which says that a row continues another"),
    (PAIR | {"is_correct": False}, "is_correct, which says which rows are good"),
    (PAIR | {"choices": ["a", "b"]}, "choices, which belongs to the prompt"),
    (PAIR | {"A": "x", "B": "y", "C": "z"}, "A, which belongs to the prompt"),
    (PAIR | {"opa": "x", "opb": "y"}, "opa, which belongs to the prompt"),
    (PAIR | {"option_1": "x"}, "option_1, which belongs to the prompt"),
    (PAIR | {"document": "d"}, "document, which belongs to the prompt"),
    (PAIR | {"supportingPassages": ["d"]}, "supportingPassages, which belongs to the prompt"),
    (PAIR | {"rationale": "r"}, "rationale, which may belong to the answer"),
    (PAIR | {"Complex_CoT": "r"}, "Complex_CoT, which may belong to the answer"),
    (PAIR | {"rejected_response": "r"}, "rejected_response, which holds one of two answers"),
    (CHAT | {"rejected_response": "r"}, "rejected_response, which holds one of two answers"),
    (CHAT | {"image_path": "x.png"}, "image_path, which holds what is not text"),
    (CHAT | {"sample_weight": 0.5}, "sample_weight, which says what is learnt"),
    (CHAT | {"chat_template_kwargs": {}}, "chat_template_kwargs, which is meant for the chat template"),
    (CHAT | {"system": "a", "system_prompt": "b"}, "system, which holds a system prompt"),
]


@pytest.mark.parametrize(("row", "words"), WISHES)
def test_a_wish_is_refused_and_left_out_by_data_shape(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"without the column {words}") as refused:
        read(tmp_path, row, row)
    chosen = str(refused.value).rsplit("data.shape: ", 1)[1].split(",")[0]
    shape = read(tmp_path, row, row, shape=chosen)
    assert words.split(",")[0] in shape.unused


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (PAIR | {"system_prompt": "s"}, "system_prompt"),
        (PAIR | {"functions": [SCHEMA]}, "functions"),
        (CHAT | {"functions": [SCHEMA]}, "functions"),
        (CHAT | {"functions": [SCHEMA], "system": "s"}, "functions"),
        (CHAT | {"system": "s", "system_prompt": ""}, "system"),
        (TEXT | {"answer": "a"}, "answer"),
        (TEXT | {"intent": "a"}, "intent"),
        (TEXT | {"question": "a"}, "question"),
    ],
)
def test_the_remedy_uses_the_column(tmp_path: Path, row: dict[str, Any], column: str) -> None:
    with pytest.raises(ValueError, match=r"to use it, write data\.columns: ") as refused:
        read(tmp_path, row)
    columns = yaml.safe_load(str(refused.value).split("data.columns: ", 1)[1].split("}")[0] + "}")
    before = read(tmp_path, row, shape=str(refused.value).rsplit("data.shape: ", 1)[1].split(",")[0])
    shape = read(tmp_path, row, columns=columns)
    assert column in shape.columns.values()
    assert column in before.unused
    assert set(before.columns.values()) <= set(shape.columns.values())  # what is used without it is kept
    assert isinstance(shape.canonical(row), dict)


@pytest.mark.parametrize(
    ("row", "renamed"),
    [
        ({"instruction": "q", "context": "c", "response": "a"}, {"context": "input", "response": "output"}),
        ({"instruction": "q", "input": "c", "response": "a"}, {"response": "output"}),
    ],
)
def test_renamed_as_the_remedy_says_rows_are_alpaca(
    tmp_path: Path, row: dict[str, Any], renamed: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"\(alpaca\)") as refused:
        read(tmp_path, row)
    assert all(f"{new}" in str(refused.value) for new in renamed.values())
    shape = read(tmp_path, {renamed.get(name, name): value for name, value in row.items()})
    assert (shape.name, shape.unused) == ("alpaca", ())


@pytest.mark.parametrize(
    "row",
    [
        PAIR | {"document_id": 3, "context_length": 9, "num_choices": 4, "reasoning_type": "x"},
        PAIR | {"id": "a", "source": "b", "category": "c", "title": "d", "lang": "en", "role": "user"},
        CHAT | {"prompt": "q", "prompt_id": "3", "turn": 1, "conversation_id": "7", "language": "en"},
        TEXT | {"url": "u", "timestamp": "t", "meta": {"a": 1}, "image_caption": "c", "token_count": 5},
    ],
)
def test_columns_that_only_describe_a_row_are_listed(tmp_path: Path, row: dict[str, Any]) -> None:
    assert set(read(tmp_path, row).unused) == set(row) - {"question", "answer", "messages", "text"}


def test_other_letters_name_what_they_leave_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\{prompt: Question, completion: Response\}, which leaves out Complex_CoT"):
        read(tmp_path, {"Question": "q", "Complex_CoT": "c", "Response": "r"})
    with pytest.raises(ValueError, match=r"a row seems to be one message: write one row for each conversation"):
        read(tmp_path, {"conversation_id": 1, "role": "user", "content": "q"})
