"""Chats from a file to the tokens that are trained and to the prompts that are answered."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.evaluation.questions import questions_of
from tests.support.chat_templates import PUBLIC_TEMPLATES, messages
from tests.support.tiny_tokenizers import CHATML, byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture
def load(tmp_path: Path, tiny_llama_dir: Path) -> Any:
    def load_rows(tokenizer: "PreTrainedTokenizerFast", rows: list[Any], **keys: Any) -> TokenizedData:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = DataConfig(name=str(path), **{"num_eval": 2, "max_length": 128} | keys)
        return load_data(data, ModelConfig(name=str(tiny_llama_dir)), tokenizer)

    return load_rows


def chats(num: int) -> list[dict[str, Any]]:
    return [
        {"messages": messages(("u", f"Q{n}?"), ("a", f"Blue {n}"), ("u", "And?"), ("a", "Red"))} for n in range(num)
    ]


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "mistral_nemo", "vicuna", "harmony"])
def test_questions_are_the_prompts_of_generation(load: Any, name: str) -> None:
    tokenizer = PUBLIC_TEMPLATES[name].tokenizer()
    rows = chats(6)
    data = load(tokenizer, rows)
    prompts = {
        tuple(
            tokenizer(
                tokenizer.apply_chat_template(row["messages"][:3], tokenize=False, add_generation_prompt=True)
                if name != "harmony"
                else tokenizer.apply_chat_template(
                    row["messages"][:3],
                    tokenize=False,
                    add_generation_prompt=True,
                    chat_template=PUBLIC_TEMPLATES[name].text.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'"),
                ),
                add_special_tokens=False,
            )["input_ids"]
        )
        for row in rows
    }
    assert {question.prompt for question in questions_of(data.evaluation)} <= prompts


def test_notes_are_counted_for_the_data_set(load: Any) -> None:
    assert load(PUBLIC_TEMPLATES["qwen3"].tokenizer(), chats(6)).notes == {"last_turn_only": 6}
    assert load(byte_level(), chats(6), turns="separate").notes == {"turns_separated": 12}


def test_separate_rows_of_a_chat_stay_in_one_split(load: Any) -> None:
    data = load(byte_level(), chats(12), turns="separate")
    assert set(data.train.groups.tolist()).isdisjoint(data.evaluation.groups.tolist())


def test_the_chosen_template_is_kept_for_exports(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "zephyr.jinja"
    path.write_text(PUBLIC_TEMPLATES["zephyr"].text, encoding="utf-8")
    assert load(byte_level(), chats(6)).chat_template is None
    before = load(byte_level(), chats(6), chat_template=str(path))
    assert before.chat_template == PUBLIC_TEMPLATES["zephyr"].text
    path.write_text(PUBLIC_TEMPLATES["vicuna"].text, encoding="utf-8")
    assert load(byte_level(), chats(6), chat_template=str(path)).digest != before.digest


@pytest.mark.parametrize(("key", "value"), [("chat_template", "chatml"), ("turns", "last")])
def test_keys_about_chats_are_refused_for_other_rows(load: Any, key: str, value: str) -> None:
    rows = [{"prompt": f"Q{n}?", "completion": "Blue"} for n in range(6)]
    with pytest.raises(ValueError, match=rf"data\.{key}: {value}: .*holds no chats, which this key is about"):
        load(byte_level(), rows, **{key: value})


def test_tools_of_a_row_reach_the_template_from_a_file(load: Any) -> None:
    tokenizer = byte_level(chat_template="{% if tools %}{{ tools[0].function.name + '\n' }}{% endif %}" + CHATML)
    tool = {"type": "function", "function": {"name": "look"}}
    rows = [{"messages": messages(("u", f"{n}?"), ("a", "Blue")), "tools": [tool]} for n in range(6)]
    data = load(tokenizer, rows)
    assert "look" in tokenizer.decode(data.train.input_ids[0])
    assert load(tokenizer, [{"messages": row["messages"]} for row in rows]).digest != data.digest
