"""What of a rendered chat is learnt: headers, generation blocks, ends, and tokens at the edges."""

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat_templates import messages
from tests.support.learnt_text import learn, learnt_runs, notes, refusal, shown
from tests.support.tiny_tokenizers import byte_level, metaspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT = messages(("u", "Hi"), ("a", "Blue"), ("u", "And?"), ("a", "Red"))
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def each(body: str, asked: str = ASKED) -> str:
    return f"{{% for m in messages %}}{body}{{% endfor %}}{asked}"


def blocks(before: str, block: str, after: str) -> str:
    """ChatML whose assistant's turns are in three parts, the second of them a generation block."""
    marked = "".join([before, "{% generation %}", block, "{% endgeneration %}", after])
    return each("{% if m.role == 'assistant' %}" + marked + "{% else %}" + TURN + "{% endif %}")


HEADER, CONTENT, END = "{{ '<|im_start|>assistant\n' }}", "{{ m.content }}", "{{ '<|im_end|>' }}"


@pytest.mark.parametrize(
    "template",
    [
        each(TURN, asked=""),
        "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + each(TURN, asked=""),
        each("{{ m.role + ': ' + m.content + '<|im_end|>\n' }}", asked=""),
        each("{{ '### ' + m.role + ':\n\n' + m.content | trim + '<|im_end|>\n' }}", asked=""),
    ],
)
def test_a_header_without_a_generation_prompt_is_not_learnt(template: str) -> None:
    tokenizer = byte_level(chat_template=template)
    assert learnt_runs(tokenizer, CHAT) == [["Blue<|im_end|>", "Red<|im_end|>"]]
    first = messages(("a", "Hello"), ("u", "Hi"), ("a", "Blue"))
    assert learnt_runs(tokenizer, first) == [["Hello<|im_end|>", "Blue<|im_end|>"]]


def test_a_default_system_prompt_is_not_learnt() -> None:
    system = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    tokenizer = byte_level(chat_template=system + each(TURN))
    first = messages(("a", "Hello"), ("u", "Hi"), ("a", "Blue"))
    assert learnt_runs(tokenizer, first) == [["Hello<|im_end|>", "Blue<|im_end|>"]]


@pytest.mark.parametrize(
    ("template", "noted"),
    [
        (blocks(HEADER, CONTENT + END, "{{ '\n' }}"), ()),
        (blocks("", HEADER + CONTENT + END + "{{ '\n' }}", ""), ()),
        (blocks(HEADER, CONTENT, END + "{{ '\n' }}"), ("end_outside_block",)),
    ],
    ids=["content and end", "whole turn", "content only"],
)
def test_generation_blocks_learn_answer_and_end(template: str, noted: tuple[str, ...]) -> None:
    tokenizer = byte_level(chat_template=template)
    assert learnt_runs(tokenizer, CHAT) == [["Blue<|im_end|>", "Red<|im_end|>"]]
    assert notes(tokenizer, CHAT) == [noted]


def test_what_generation_blocks_leave_out_is_not_learnt() -> None:
    template = blocks(HEADER + "{{ '<note>fixed</note>' }}", CONTENT + END, "{{ '\n' }}")
    assert learnt_runs(byte_level(chat_template=template), CHAT) == [["Blue<|im_end|>", "Red<|im_end|>"]]


def test_an_answer_outside_all_generation_blocks_is_refused() -> None:
    template = each(TURN) + "{% generation %}{% endgeneration %}"
    assert "message 4 stands in none of them" in refusal(byte_level(chat_template=template), CHAT)


def test_a_header_behind_every_chat_is_not_learnt() -> None:
    template = each("{{ '# ' + m.role + '\n' + m.content + '\n\n' }}", asked="{{ '# assistant\n' }}")
    assert learnt_runs(byte_level(chat_template=template), CHAT) == [["Blue", "Red"]]


@pytest.mark.parametrize("asked", ["{% if add_generation_prompt %}<|reply|>{% endif %}", ""])
def test_a_header_behind_every_chat_ends_no_turn(asked: str) -> None:
    answer = "{{ '<|open|><|bot|>" + ("<|reply|>" if asked else "") + "' + m.content + '<|/reply|><|close|>' }}"
    user = "{{ '<|open|><|human|>' + m.content + '<|close|>' }}"
    body = "{% if m.role == 'assistant' %}" + answer + "{% else %}" + user + "{% endif %}"
    for first in ("", "{{ bos_token }}", "<|open|><|setup|>You help.<|close|>"):
        tokenizer = byte_level(chat_template=first + each(body, "{{ '<|open|><|bot|>' }}" + asked))
        marks = ["<|open|>", "<|close|>", "<|reply|>", "<|/reply|>", "<|bot|>", "<|human|>", "<|setup|>"]
        tokenizer.add_special_tokens({"extra_special_tokens": marks, "bos_token": "<s>"})
        assert learnt_runs(tokenizer, CHAT) == [["Blue<|/reply|><|close|>", "Red<|/reply|><|close|>"]]
        assert notes(tokenizer, CHAT) == [()]


@pytest.mark.parametrize("marks", [["<|end|>", "<|user|>", "<|assistant|>"], []])
def test_a_header_behind_questions_only_is_no_end_of_chats(marks: list[str]) -> None:
    template = each(
        "{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}"
        "{% else %}{{ m.content + '<|end|>\n' }}{% endif %}",
        asked="",
    )
    tokenizer = byte_level(chat_template=template)
    tokenizer.add_tokens(marks)
    chat = messages(("u", "Hi"), ("a", "\n\nBlue"), ("u", "And?"), ("a", "Red"))
    ends = "<|end|>" if marks else "<|end|>\n"
    assert learnt_runs(tokenizer, chat) == [[f"\n\nBlue{ends}", f"Red{ends}"]]


def test_a_header_is_not_learnt_where_the_generation_prompt_is_missing() -> None:
    asked = ASKED.replace("add_generation_prompt", "add_generation_prompt and messages[-1].role == 'user'")
    tokenizer = byte_level(chat_template=each(TURN, asked))
    chat = messages(("u", "Hi"), ("a", "Blue"), ("t", "0"), ("a", "Red"))
    assert learnt_runs(tokenizer, chat) == [["Blue<|im_end|>", "Red<|im_end|>"]]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "{{ '<|im_start|>' + m.role + '\n' + m.content + m.content + '<|im_end|>\n' }}",
            "content of message 4 2 times",
        ),
        ("{{ '<|im_start|>' + m.role + '\n' + m.content[:2] + '<|im_end|>\n' }}", "leaves out"),
        (
            "{{ '<|im_start|>' + m.role + '\n' + m.content | upper + '<|im_end|>\n' }}",
            "leaves out content of message 4",
        ),
        (
            "{{ '<|im_start|>' + m.role + '\n' + m.content + (' short' if m.content | length < 9 else '') }}<|im_end|>",
            "depends on its text",
        ),
        ("{% if m.role != 'assistant' %}" + TURN + "{% endif %}", "leaves out content of message 4"),
    ],
)
def test_templates_that_alter_an_answer_are_refused(body: str, reason: str) -> None:
    assert reason in refusal(byte_level(chat_template=each(body)), CHAT)


def test_a_question_that_the_template_drops_is_refused() -> None:
    template = each("{% if m.role != 'system' %}" + TURN + "{% endif %}")
    chat = messages(("s", "Be brief."), ("u", "Hi"), ("a", "Blue"))
    assert "leaves out message 1 (system)" in refusal(byte_level(chat_template=template), chat)


def test_an_end_is_learnt_once_and_nothing_behind_it() -> None:
    template = each(
        "{{ '[' + m.role + ']' + m.content + '<|im_end|>' }}", "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = byte_level(chat_template=template + "{{ '' if add_generation_prompt else '<|endoftext|>' }}")
    (row,) = learn(tokenizer, CHAT)
    assert isinstance(row, tuple)
    assert shown(tokenizer, row[0]).endswith("[assistant][[Red<|im_end|>]]<|endoftext|>")


def test_a_prompt_keeps_its_own_tokens_at_the_edge() -> None:
    template = each(
        "{{ m.role + ' : ' + m.content + '<|im_end|>' }}",
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}",
    )
    tokenizer = byte_level(chat_template=template)
    chat = messages(("u", "Hi"), ("a", "helpful"))
    (row,) = learn(tokenizer, chat)
    assert isinstance(row, tuple)
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert list(row[0].input_ids[: len(own)]) == own
    assert row[0].label_positions[0] == len(own) - 1
    assert row[0].notes == ("boundary_moved",)
    assert shown(tokenizer, row[0]) == "user : Hi<|im_end|>assistant : [[helpful<|im_end|>]]"


def test_several_edges_inside_tokens_are_all_cut() -> None:
    template = each(
        "{{ m.role + ' : ' + m.content + ' ' }}", "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    tokenizer = byte_level(chat_template=template)
    (row,) = learn(tokenizer, messages(("u", "Hi"), ("a", "helpful"), ("u", "a"), ("a", "colour")))
    assert isinstance(row, tuple)
    text = shown(tokenizer, row[0])
    assert text.replace("[[", "").replace("]]", "") == "user : Hi assistant : helpful user : a assistant : colour "
    assert "assistant : [[helpful" in text
    assert "assistant : [[colour" in text


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_sentencepiece_blanks_stay_out_of_answers(scheme: str) -> None:
    template = each(
        "{{ '[' + m.role + ']\n' + m.content + eos_token }}",
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}",
    )
    tokenizer = metaspace(scheme, chat_template=template)
    (row,) = learn(tokenizer, messages(("u", "Hi"), ("a", "def f(x): return x")))
    assert isinstance(row, tuple)
    learnt = [row[0].input_ids[position + 1] for position in row[0].label_positions]
    assert tokenizer.decode(learnt) == "def f(x): return x</s>"


def trims_offsets(chat_template: str) -> "PreTrainedTokenizerFast":
    from tokenizers import processors

    tokenizer = byte_level(chat_template=chat_template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def test_edges_are_found_though_offsets_leave_out_blanks() -> None:
    template = each(
        "{{ m.role + ': ' + m.content + '<|im_end|>' }}", "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    for make in (trims_offsets, lambda text: byte_level(chat_template=text)):
        tokenizer: Any = make(template)
        assert learnt_runs(tokenizer, CHAT) == [[" Blue<|im_end|>", " Red<|im_end|>"]]


def test_a_loss_on_all_learns_every_token() -> None:
    (row,) = learn(byte_level(), CHAT, loss_on="all")
    assert isinstance(row, tuple)
    assert shown(byte_level(), row[0]).startswith("<|im_start|>user\nHi")
