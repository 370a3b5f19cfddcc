"""A completion's tokens continue the prompt's own tokens and decode to the row's text, in every tokenizer family."""

import itertools
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from loragrid.data.bad_rows import BadRow
from loragrid.data.boundary import Boundary
from loragrid.data.labelled_tokens import LabelledTokens, Tokenized
from loragrid.data.text_frame import TextFrame
from loragrid.data.tokenization import PairTokenizer
from loragrid.trials.row_notes import ROW_NOTES
from tests.support.kinds_of_tokenizer import LOSSLESS, LOSSY, bert, llama_2, sentencepiece, t5
from tests.support.tiny_tokenizers import byte_level

PROMPTS = [
    "def f(x):\n    ",
    "Answer: ",
    "Answer:",
    "Q\n",
    "",
    "  ",
    "wor",
    "12",
    "你",
    "e",
    "Q:\t",
    "x = (",
    "🙂",
    "é\n\n",
]
COMPLETIONS = [
    "return x + 0",
    " yes",
    "\nyes",
    "\n\n  if x:",
    " \ny",
    "    go",
    "345",
    " 345",
    "好 世界",
    "🙂",
    "́a",
    "ld",
]


def one(tokenized: Tokenized) -> LabelledTokens:
    assert isinstance(tokenized, tuple), tokenized
    (row,) = tokenized
    return row


def pair(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> LabelledTokens:
    return one(PairTokenizer(tokenizer).tokenize([{"prompt": prompt, "completion": completion}])[0])


def learnt(tokenizer: PreTrainedTokenizerFast, row: LabelledTokens) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens([row.input_ids[position + 1] for position in row.label_positions]))


@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS)
def test_rows_decode_to_their_text_and_begin_with_the_prompt(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    frame = TextFrame(tokenizer)
    rows = [{"prompt": p, "completion": c} for p, c in itertools.product(PROMPTS, COMPLETIONS)]
    for given, tokenized in zip(rows, PairTokenizer(tokenizer).tokenize(rows), strict=True):
        row = one(tokenized)
        own = row.input_ids[len(frame.start) : len(row.input_ids) - len(frame.end)]
        text = str(tokenizer.backend_tokenizer.decode(list(own), skip_special_tokens=False))
        wanted = given["prompt"] + given["completion"]
        # One blank before a whole text is this kind's convention; every other character counts.
        assert text in (wanted, f" {wanted}", wanted.removeprefix(" "))
        prompt = tuple(tokenizer(given["prompt"])["input_ids"])
        assert row.input_ids[: len(prompt)] == prompt
        num_labels = len(row.input_ids) - max(len(prompt), 1)
        assert row.label_positions == tuple(range(len(row.input_ids) - 1))[-num_labels:]
        unled = {"first_token_not_learnt"} if not prompt and not frame.start else set()
        assert set(row.notes) - {"boundary_moved"} == unled


@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS)
def test_only_rows_whose_joint_text_merges_are_noted(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    rows = [{"prompt": p, "completion": c} for p, c in itertools.product(PROMPTS, COMPLETIONS)]
    kinds = set()
    for given, tokenized in zip(rows, PairTokenizer(tokenizer).tokenize(rows), strict=True):
        row = one(tokenized)
        joint = (*tokenizer(given["prompt"] + given["completion"])["input_ids"], tokenizer.eos_token_id)
        assert ("boundary_moved" in row.notes) == (row.input_ids != joint)
        kinds.add(row.input_ids == joint)
    assert kinds == {True, False}
    assert "boundary_moved" in ROW_NOTES


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_sentencepiece_adds_no_blank_between_indent_and_code(scheme: str) -> None:
    tokenizer = sentencepiece(scheme)
    assert learnt(tokenizer, pair(tokenizer, "def f(x):\n    ", "return"))[0] == "retu"
    assert learnt(tokenizer, pair(tokenizer, "Copy 12: ", "12")) == ["1", "2", "</s>"]
    assert learnt(tokenizer, pair(tokenizer, "Copy:", " 12"))[0].startswith("▁")
    alone = tokenizer("return", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone)[0] != "retu"  # by itself it would begin with a blank


def test_wordpiece_continues_a_word_without_a_blank() -> None:
    tokenizer = bert()
    assert learnt(tokenizer, pair(tokenizer, "colo", "ur"))[0].startswith("##")
    assert not learnt(tokenizer, pair(tokenizer, "colour ", "ur"))[0].startswith("##")


def test_a_completion_that_cannot_continue_is_refused() -> None:
    rows = [{"prompt": "wor", "completion": "🙂"}]  # WordPiece knows no such character within a word
    (refused,) = PairTokenizer(bert()).tokenize(rows)
    assert isinstance(refused, BadRow)
    assert refused.column == "completion"
    assert "a blank or a line break" in refused.what


@pytest.mark.parametrize("make", LOSSY.values(), ids=LOSSY)
def test_characters_without_a_token_are_noted(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    assert "unknown_characters" in pair(tokenizer, "Is it 猫? ", "No 🙂").notes
    assert "unknown_characters" not in pair(tokenizer, "Name a colour. ", "Blue is a colour.").notes
    assert "unknown_characters" not in pair(llama_2(), "Is it 猫? ", "No 🙂").notes


def test_text_that_a_tokenizer_normalises_is_noted() -> None:
    assert "text_altered" in pair(bert(), "Name", "Blue").notes
    assert pair(byte_level(), "Name", " Blue").notes == ()


@pytest.mark.parametrize(
    ("make", "prompt", "completion"),
    [
        (llama_2, "<s>[INST] Name a colour [/INST]", " Blue </s>"),
        (llama_2, "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]", "d"),
        (llama_2, "a<s>b", "c</s>\n"),
        (lambda: sentencepiece("always"), "<s>[INST] a", "b</s>"),
        (bert, "is it (good), or not?", "x: [sep] y's"),
        (bert, "count to 5:", " one, two"),
        (t5, "Name a colour:", "Blue, or (red)"),
    ],
)
def test_blanks_that_decoding_adds_alter_nothing(
    make: Callable[[], PreTrainedTokenizerFast], prompt: str, completion: str
) -> None:
    assert "text_altered" not in pair(make(), prompt, completion).notes


@pytest.mark.parametrize(
    ("make", "completion"),
    [(bert, "Blue"), (bert, "b  c"), (bert, "b\nc"), (bert, "é"), (t5, "ﬁve"), (t5, "a  b"), (t5, "a²")],
)
def test_changed_characters_and_lost_blanks_are_noted(
    make: Callable[[], PreTrainedTokenizerFast], completion: str
) -> None:
    assert {"text_altered", "unknown_characters"} & set(pair(make(), "a: ", completion).notes)
    assert "text_altered" not in pair(llama_2(), "a: ", completion).notes


@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS)
def test_continuing_tokens_is_continuing_their_text(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    boundary = Boundary(make())
    for before in ("", "A long text before it, and more of it. " * 20):
        for prompt in (prompt for prompt in PROMPTS if (before + prompt).strip()):
            joined = boundary.join([before + prompt] * len(COMPLETIONS), COMPLETIONS)
            assert boundary.continuations(joined[0].prompt, COMPLETIONS) == [row.completion for row in joined]


def test_continuing_tokens_of_wordpiece_is_continuing_their_text() -> None:
    boundary, completions = Boundary(bert()), ["yes", " yes", "return x"]
    for prompt in ("answer:", "wor", "x = ("):  # these tokens decode to nothing but the prompt's words
        joined = boundary.join([prompt] * len(completions), completions)
        assert boundary.continuations(joined[0].prompt, completions) == [row.completion for row in joined]
