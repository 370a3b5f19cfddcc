"""Start and end tokens are there once, whether the tokenizer adds them, LoraGrid does, or the text holds them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loragrid.config.experiment import DataConfig
from loragrid.data.chats.template import BUILT_IN
from loragrid.data.end_tokens import end_token_ids
from loragrid.data.held_out_text import held_out_pieces
from loragrid.data.labelled_tokens import LabelledTokens, Tokenized
from loragrid.data.shapes.recognition import Shape
from loragrid.data.text_frame import TextFrame, special_ids
from loragrid.data.tokenization import PairTokenizer, RowTokenizer, TextTokenizer
from loragrid.models.base_ends import BASE_ENDS
from loragrid.trials.skip_reasons import empty
from tests.support.chat_templates import PUBLIC_TEMPLATES
from tests.support.kinds_of_tokenizer import bert, gemma, llama_2, llama_3, sentencepiece, t5, xlm_roberta
from tests.support.tiny_tokenizers import byte_level, metaspace


def outcome(tokenizer: PreTrainedTokenizerFast, **columns: str) -> Tokenized:
    kind = TextTokenizer if "text" in columns else PairTokenizer
    (tokenized,) = kind(tokenizer).tokenize([columns])
    return tokenized


def chatml(**settings: Any) -> PreTrainedTokenizerFast:
    return byte_level(bos="<s>", adds_bos=True, **settings)


def row_of(tokenizer: PreTrainedTokenizerFast, **columns: str) -> LabelledTokens:
    tokenized = outcome(tokenizer, **columns)
    assert isinstance(tokenized, tuple), tokenized
    return tokenized[0]


def shown(tokenizer: PreTrainedTokenizerFast, row: LabelledTokens) -> str:
    """The row's text; what is learnt stands between [[ and ]]."""
    start = row.label_positions[0] + 1
    parts = [
        tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        for ids in (row.input_ids[:start], row.input_ids[start:])
    ]
    return f"{parts[0]}[[{parts[1]}]]"


# Start tokens


@pytest.mark.parametrize("before", ["", " ", "\n", " \n "])
@pytest.mark.parametrize("column", ["text", "prompt"])
def test_a_start_token_in_the_text_is_not_doubled(column: str, before: str) -> None:
    tokenizer = chatml()
    columns = {column: f"{before}<s>Name"} | ({"completion": " Blue"} if column == "prompt" else {})
    row = row_of(tokenizer, **columns)
    plain = row_of(tokenizer, **columns | {column: "Name"})
    assert row.input_ids == plain.input_ids
    assert row.label_positions == plain.label_positions
    assert "start_not_doubled" in row.notes
    assert "start_not_doubled" not in plain.notes


@pytest.mark.parametrize("make", [llama_2, llama_3, gemma, lambda: sentencepiece("first")])
def test_every_family_starts_once(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    start = tokenizer.bos_token
    for columns in ({"prompt": f"{start}[A]", "completion": "b"}, {"text": f"{start}[A] b"}, {"text": f"{start} b"}):
        row = row_of(tokenizer, **columns)
        assert row.input_ids.count(tokenizer.bos_token_id) == 1
        assert row.input_ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in [row.input_ids[position + 1] for position in row.label_positions]


def test_an_empty_prompt_takes_the_start_from_the_completion() -> None:
    row = row_of(chatml(), prompt="", completion="<s>Blue")
    assert shown(chatml(), row) == "<s>[[Blue<|im_end|>]]"
    assert row.notes == ("start_not_doubled",)


def test_a_tokenizer_without_start_token_keeps_the_texts_own() -> None:
    row = row_of(byte_level(bos="<s>"), prompt="<s>Name", completion=" Blue")
    assert shown(byte_level(bos="<s>"), row) == "<s>Name[[ Blue<|im_end|>]]"
    assert "start_not_doubled" not in row.notes


def test_a_start_token_further_inside_stays_and_is_noted() -> None:
    row = row_of(chatml(), prompt="Name<s>", completion="Blue")
    assert shown(chatml(), row) == "<s>Name<s>[[Blue<|im_end|>]]"
    assert row.notes == ("special_tokens_read",)


def test_the_tokens_decide_not_the_text() -> None:
    tokenizer = chatml()
    tokenizer.split_special_tokens = True
    row = row_of(tokenizer, prompt="<s>Name", completion=" Blue<|im_end|>")
    assert row.notes == ()
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    assert shown(tokenizer, row) == "<s><s>Name[[ Blue<|im_end|><|im_end|>]]"  # the first of each is plain text


# End tokens


@pytest.mark.parametrize("behind", ["", "\n", " ", "\n\n"])
@pytest.mark.parametrize(("eos", "end"), [("im_end", "im_end"), ("endoftext", "endoftext"), ("endoftext", "im_end")])
@pytest.mark.parametrize("column", ["text", "completion"])
def test_an_end_token_in_the_text_is_not_doubled(column: str, eos: str, end: str, behind: str) -> None:
    end, tokenizer = f"<|{end}|>", chatml(eos_token=f"<|{eos}|>")  # the template ends turns with <|im_end|>
    columns = {column: f"Blue{end}{behind}"} | ({"prompt": "Name:"} if column == "completion" else {})
    row = row_of(tokenizer, **columns)
    assert shown(tokenizer, row).endswith(f"Blue{end}]]")
    assert row.notes == ("end_not_doubled",)


CONTENT = ["<pos>", "<neg>", "</answer>", "<image>", "</tool_call>", "<|fim_middle|>", "<|im_start|>", "<|endoftext|>"]


@pytest.mark.parametrize("written", ["{}", "so {}", "{}\n", "{0}{0}", "a<|im_end|>{}"])
@pytest.mark.parametrize("token", CONTENT)
@pytest.mark.parametrize("column", ["text", "completion"])
def test_a_special_token_at_the_end_is_content(column: str, token: str, written: str) -> None:
    tokenizer = chatml(extra_special_tokens=CONTENT)
    columns = {column: written.format(token)} | ({"prompt": "Q:"} if column == "completion" else {})
    row = row_of(tokenizer, **columns)
    assert shown(tokenizer, row).endswith(f"{written.format(token)}<|im_end|>]]".replace("<s>[[", "[["))
    assert row.notes == ("special_tokens_read",)


@pytest.mark.parametrize("named", [(0,), (0, 2)])
def test_the_ends_of_the_base_are_ends(named: tuple[int, ...]) -> None:
    tokenizer = chatml()
    setattr(tokenizer, BASE_ENDS, (*named, tokenizer.convert_tokens_to_ids("B"), 10**6))
    row = row_of(tokenizer, prompt="Name:", completion="Blue<|endoftext|>")
    assert shown(tokenizer, row).endswith("[[Blue<|endoftext|>]]")
    assert row.notes == ("end_not_doubled",)
    # A number in the base's files that is a common token ends nothing.
    assert shown(tokenizer, row_of(tokenizer, prompt="Name:", completion="A B")).endswith("[[A B<|im_end|>]]")


@pytest.mark.parametrize("name", PUBLIC_TEMPLATES)
def test_every_family_ends_turns_with_its_own_tokens(name: str) -> None:
    tokenizer = PUBLIC_TEMPLATES[name].tokenizer()
    others = {"llama3_always": "<|eot_id|>", "gemma2": "<end_of_turn>", "gemma3": "<end_of_turn>"}
    others |= {"phi3": "<|end|>", "harmony": "<|call|>"}
    wanted = {PUBLIC_TEMPLATES[name].eos} | ({others[name]} if name in others else set())
    assert {tokenizer.convert_ids_to_tokens(number) for number in end_token_ids(tokenizer)} == wanted


def test_a_template_of_the_data_ends_turns_too() -> None:
    tokenizer = chatml(chat_template=None, eos_token="<|endoftext|>")
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn not in end_token_ids(tokenizer)
    assert turn in end_token_ids(tokenizer, BUILT_IN["chatml"])


@pytest.mark.parametrize("inside", ["A<|im_end|>\nB", "A<|im_start|>B"])
def test_special_tokens_inside_stay_and_are_noted(inside: str) -> None:
    row = row_of(chatml(), prompt="Q", completion=inside)
    assert shown(chatml(), row) == f"<s>Q[[{inside}<|im_end|>]]"
    assert row.notes == ("special_tokens_read",)


def test_a_rendered_chat_keeps_its_own_start_and_end() -> None:
    prompt = "<s><|im_start|>user\nName<|im_end|>\n<|im_start|>assistant\n"
    row = row_of(chatml(), prompt=prompt, completion="blue<|im_end|>")
    assert shown(chatml(), row) == f"{prompt}[[blue<|im_end|>]]"
    assert set(row.notes) == {"start_not_doubled", "end_not_doubled", "special_tokens_read"}


@pytest.mark.parametrize(
    ("make", "start", "end"), [(t5, "", "</s>"), (xlm_roberta, "<s>", "</s>"), (bert, "[CLS]", "[SEP]")]
)
def test_added_tokens_never_part_prompt_and_completion(
    make: Callable[[], PreTrainedTokenizerFast], start: str, end: str
) -> None:
    tokenizer = make()
    row = row_of(tokenizer, prompt="Name a colour. ", completion="Blue")
    added = [tokenizer.convert_tokens_to_ids(token) for token in (start, end) if token]
    assert [token for token in row.input_ids if token in special_ids(tokenizer)] == added
    assert row.input_ids[-1] == added[-1]
    assert row_of(tokenizer, prompt="Name a colour. ", completion=f"Blue{end}").input_ids == row.input_ids


def test_an_end_that_the_tokenizer_adds_is_added_once() -> None:
    from tokenizers import processors

    tokenizer = llama_2()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = both
    for columns in ({"prompt": "Name: ", "completion": "Blue"}, {"text": "Blue"}, {"text": "<s>Blue</s>"}):
        row = row_of(tokenizer, **columns)
        assert [row.input_ids.count(number) for _, number in ids] == [1, 1]
        assert (row.input_ids[0], row.input_ids[-1]) == (ids[0][1], ids[1][1])


@pytest.mark.parametrize("completion", ["Ä", "a\n", "好"])
def test_bytes_marked_as_special_are_no_ends(completion: str) -> None:
    row = row_of(metaspace("first"), prompt="Q:", completion=completion)
    assert row.input_ids[-1] == metaspace("first").eos_token_id
    assert row.notes == ()


def test_several_tokens_before_a_text_are_added_once() -> None:
    from tokenizers import processors

    tokenizer = chatml()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_start|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <|im_start|> $A", special_tokens=ids
    )
    assert TextFrame(tokenizer).start == tuple(number for _, number in ids)
    wanted = row_of(tokenizer, text="Name").input_ids
    assert row_of(tokenizer, text="<s>Name").input_ids == wanted
    assert row_of(tokenizer, text="<s><|im_start|>Name").input_ids == wanted


@pytest.mark.parametrize("text", ["Name", "<s>Name", "\n<s>Name", "<s>Name</s>", "Name</s>\n"])
def test_held_out_text_starts_and_ends_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    data = DataConfig(name="rows.jsonl", forgetting_name=str(tmp_path / "held_out.jsonl"))
    (piece,) = held_out_pieces(data, xlm_roberta())
    special = [token for token in piece if token in special_ids(xlm_roberta())]
    assert xlm_roberta().convert_ids_to_tokens(special) == ["<s>", "</s>"]


def test_left_over_padding_and_truncation_change_nothing() -> None:
    plain, used = chatml(), chatml()
    used.backend_tokenizer.enable_truncation(3)
    used.backend_tokenizer.enable_padding(length=20)
    columns = {"prompt": "A prompt of many words", "completion": " and an answer"}
    assert row_of(used, **columns) == row_of(plain, **columns)


def test_a_tokenizer_that_cuts_at_random_is_refused() -> None:
    tokenizer: Any = chatml()
    tokenizer.backend_tokenizer.model.dropout = 0.1
    shape, data = Shape(name="text", columns={"text": "text"}), DataConfig(name="rows.jsonl")
    with pytest.raises(ValueError, match=r"dropout 0\.1\); allowed: dropout null in tokenizer\.json"):
        RowTokenizer(tokenizer, shape, data, title="data.name: rows.jsonl")


@pytest.mark.parametrize("make", [chatml, byte_level, llama_2, gemma, bert])
@pytest.mark.parametrize("blank", ["", " ", "  \n", "\t\n\n", "\u00a0", "\u2003\u3000"])
def test_white_space_is_not_learnt_as_an_answer(make: Callable[[], PreTrainedTokenizerFast], blank: str) -> None:
    tokenizer = make()
    for end in (
        "",
        str(tokenizer.eos_token or tokenizer.sep_token),
        f" {tokenizer.eos_token or tokenizer.sep_token}\n",
    ):
        assert outcome(tokenizer, prompt="Q:", completion=blank + end) == empty("completion")
        assert outcome(tokenizer, text=blank + end) == empty("text")
    assert isinstance(outcome(tokenizer, prompt="Q:", completion=f"{blank}a"), tuple)


def test_a_first_token_without_a_start_is_noted() -> None:
    bare, started = byte_level(), chatml()
    row = row_of(bare, prompt="", completion="Blue")
    assert "first_token_not_learnt" in row.notes
    assert row.label_positions[0] == 0
    assert "first_token_not_learnt" not in row_of(bare, prompt="Q", completion="Blue").notes
    row = row_of(started, prompt="", completion="Blue")
    assert "first_token_not_learnt" not in row.notes
    assert len(row.label_positions) == len(row.input_ids) - 1
