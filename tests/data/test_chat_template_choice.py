"""`data.chat_template`: which template a data set uses."""

import json
from pathlib import Path

import pytest

from loragrid.data.chats.template import TEMPLATE_DATE, ChatTemplate, template_texts
from tests.support.chat_templates import PUBLIC_TEMPLATES, messages
from tests.support.learnt_text import learnt_runs
from tests.support.tiny_tokenizers import CHATML, byte_level

CHAT = messages(("u", "Hi"), ("a", "Blue"))


def test_null_uses_the_tokenizers_default() -> None:
    assert template_texts(byte_level(), None) == {"default": CHATML}
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}", "rag": "{{ 3 }}"}
    assert template_texts(tokenizer, None) == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}


def test_a_name_chooses_one_of_the_tokenizers_templates() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "{{ 1 }}", "rag": CHATML}
    assert template_texts(tokenizer, "rag") == {"default": CHATML}
    assert learnt_runs(tokenizer, CHAT, chat_template="rag") == [["Blue<|im_end|>"]]


def test_a_file_is_a_template_for_a_tokenizer_without_one(tmp_path: Path) -> None:
    path = tmp_path / "zephyr.jinja"
    path.write_text(PUBLIC_TEMPLATES["zephyr"].text, encoding="utf-8")
    tokenizer = byte_level(chat_template=None)
    assert learnt_runs(tokenizer, CHAT, chat_template=str(path)) == [["\nBlue<|im_end|>"]]


def test_a_files_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "zephyr.jinja"
    path.write_text(PUBLIC_TEMPLATES["zephyr"].text, encoding="utf-8-sig")
    assert template_texts(byte_level(), str(path)) == {"default": PUBLIC_TEMPLATES["zephyr"].text}


def test_chatml_is_built_in() -> None:
    tokenizer = byte_level(chat_template=None)
    assert learnt_runs(tokenizer, CHAT, chat_template="chatml") == [["Blue<|im_end|>"]]


def test_an_unknown_name_lists_the_names_there_are() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "{{ 1 }}", "rag": "{{ 3 }}"}
    with pytest.raises(ValueError, match=r"data\.chat_template: tool: .*allowed: default, rag, chatml, or a file"):
        template_texts(tokenizer, "tool")


def test_several_templates_without_a_default_must_be_chosen_from() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"rag": "{{ 3 }}"}
    with pytest.raises(ValueError, match=r"data\.chat_template: null: .*no default; allowed: rag, or a file"):
        template_texts(tokenizer, None)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"no template", b""])
def test_files_without_a_template_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.jinja"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.chat_template: .*wrong\.jinja: "):
        template_texts(byte_level(), str(path))


@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json", "own.jinja"])
def test_a_template_inside_json_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps({"chat_template": CHATML, "model_max_length": 8}), encoding="utf-8")
    assert template_texts(byte_level(), str(path)) == {"default": CHATML}
    path.write_text(json.dumps(CHATML), encoding="utf-8")
    assert template_texts(byte_level(), str(path)) == {"default": CHATML}
    for other in ({"template": CHATML}, {"chat_template": [{"name": "default", "template": CHATML}]}, [CHATML], 3):
        path.write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"data\.chat_template: .*{name}: is JSON without one template"):
            template_texts(byte_level(), str(path))


def test_a_template_that_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.jinja"
    path.write_text("{% for m in messages %}")
    with pytest.raises(ValueError, match=r"data\.chat_template: .*wrong\.jinja: .*endfor"):
        learnt_runs(byte_level(), CHAT, chat_template=str(path))


def test_templates_get_a_fixed_date() -> None:
    template = ChatTemplate(byte_level(), "{{ strftime_now('%-d %B %Y, %Y-%m-%d') }}")
    assert TEMPLATE_DATE.isoformat() == "2024-07-26"
    assert template.render(CHAT) == "26 July 2024, 2024-07-26"
