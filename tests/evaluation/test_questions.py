"""Questions begin with exactly the prompt's tokens, and labels are cut as training cuts completions."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AddedToken, PreTrainedTokenizerFast

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData, load_data, pad_rows
from loragrid.data.labelled_tokens import LabelledTokens
from loragrid.data.tokenization import PairTokenizer
from loragrid.evaluation.questions import TokenizedQuestions, questions_of
from loragrid.evaluation.task_scorer import TaskScorer
from loragrid.models.base_ends import BASE_ENDS
from loragrid.models.loading import load_tokenizer
from loragrid.tasks.contract import Question
from loragrid.tasks.discovery import read_task
from loragrid.tasks.kinds.label_likelihood import LabelLikelihood
from loragrid.training.assembly import build_batches
from loragrid.training.step import one_worker
from tests.support.kinds_of_tokenizer import LOSSLESS, bert, llama_2, sentencepiece, t5
from tests.support.small_packs import make_setup, run_pack
from tests.support.tiny_tokenizers import byte_level, metaspace, save_tiny_llama

LABELS = ["positive", "negative", "nei ther", "12", "7", "{x}", "好"]
PROMPTS = ["Review: good\nLabel:", "Review: good\nLabel: ", "x", "A long one. " * 20 + "\nS:\n", "Q: f(", "end</s>"]


def chatml_with_start() -> PreTrainedTokenizerFast:
    return byte_level(bos="<s>", adds_bos=True)


def rows_of(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, str]) -> TokenizedData:
    tokens: list[LabelledTokens] = []
    for tokenized in PairTokenizer(tokenizer).tokenize(rows):
        assert isinstance(tokenized, tuple), tokenized
        tokens += tokenized
    padded = pad_rows(tokens, 0)
    return TokenizedData(train=padded, evaluation=padded, test=padded, skipped={}, digest="", num_source_rows=len(rows))


@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS)
def test_questions_begin_with_the_prompts_own_tokens(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    rows = [{"prompt": prompt, "completion": " 12"} for prompt in PROMPTS]
    for given, question in zip(rows, questions_of(rows_of(tokenizer, *rows).evaluation), strict=True):
        assert question.prompt == tuple(tokenizer(given["prompt"])["input_ids"])


@pytest.mark.parametrize("blank", ["", " ", "\n"])
@pytest.mark.parametrize("make", [*LOSSLESS.values(), bert], ids=[*LOSSLESS, "bert"])
def test_labels_are_cut_as_training_cuts_them(make: Callable[[], PreTrainedTokenizerFast], blank: str) -> None:
    tokenizer = make()
    labels = LABELS[:3] if make is bert else LABELS
    for prompt in PROMPTS:
        data = rows_of(tokenizer, *({"prompt": prompt, "completion": f"{blank}{label}"} for label in labels))
        questions = questions_of(data.evaluation)
        rows = TokenizedQuestions(tokenizer, data)
        for question in questions:
            assert rows.completions(question, labels) == [own.reference for own in questions]


@pytest.mark.parametrize("make", [byte_level, llama_2, lambda: sentencepiece("first")])
def test_rows_with_and_without_a_blank_have_their_own_labels(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    with_blank, without = {"prompt": "S: ", "completion": "yes"}, {"prompt": "S:", "completion": " no"}
    data = rows_of(tokenizer, with_blank, without)
    first, second = TokenizedQuestions(tokenizer, data).questions["eval"]
    found = TokenizedQuestions(tokenizer, data)
    for question, lead in ((first, ""), (second, " ")):
        for label, tokens in zip(("yes", "no"), found.completions(question, ["yes", "no"]), strict=True):
            text = tokenizer.backend_tokenizer.decode([*question.prompt, *tokens], skip_special_tokens=True)
            assert text.removeprefix(" ") == f"{'S: ' if lead == '' else 'S:'}{lead}{label}"


def test_labels_of_a_chat_end_as_its_turns_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))
    save_tiny_llama(byte_level(), tmp_path / "model")
    lines = [
        {"messages": [{"role": "user", "content": f"Is {n} even?"}, {"role": "assistant", "content": answer}]}
        for n, answer in zip(range(12), itertools.cycle(["yes", "no"]), strict=False)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model, data = (
        ModelConfig(name=str(tmp_path / "model")),
        DataConfig(name=str(tmp_path / "rows.jsonl"), num_eval=4, max_length=96),
    )
    tokenizer = load_tokenizer(model)
    rows = TokenizedQuestions(tokenizer, load_data(data, model, tokenizer))
    references = {rows.text(question.reference): question.reference for question in rows.train_questions()}
    for question in rows.questions["eval"]:
        assert rows.completions(question, ["no", "yes"]) == [references["no"], references["yes"]]
    assert rows.end_token_ids() == (tokenizer.eos_token_id,)


def test_an_answer_ends_at_every_end_that_rows_use() -> None:
    tokenizer = byte_level()
    setattr(tokenizer, BASE_ENDS, (tokenizer.convert_tokens_to_ids("<|endoftext|>"),))
    data = rows_of(tokenizer, {"prompt": "Q", "completion": "A<|endoftext|>"}, {"prompt": "Q", "completion": "B"})
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert TokenizedQuestions(tokenizer, data).end_token_ids() == tuple(sorted(ends))


@pytest.mark.parametrize("lead", ["", "the label is "])
def test_special_tokens_of_labels_are_text_and_end_nothing(lead: str) -> None:
    tokenizer = byte_level(extra_special_tokens=["<pos>", "<neg>"])
    tokenizer.add_tokens([AddedToken("<call>", special=True, rstrip=True)])
    labels = [f"{lead}{label}" for label in ("<pos>", "<neg>", "x", "x<call>", "<call>", "<pos><neg>")]
    data = rows_of(tokenizer, *({"prompt": "Review:", "completion": label} for label in labels))
    rows = TokenizedQuestions(tokenizer, data)
    questions = rows.questions["eval"]
    assert [rows.text(question.reference) for question in questions] == labels
    assert rows.end_token_ids() == (tokenizer.eos_token_id,)
    for question in questions:
        assert rows.completions(question, labels) == [own.reference for own in questions]


@pytest.mark.parametrize("make", [chatml_with_start, llama_2, bert])
def test_the_start_and_the_end_of_a_row_are_no_text(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    rows = TokenizedQuestions(tokenizer, rows_of(tokenizer, {"prompt": "blue ", "completion": "is a colour"}))
    (question,) = rows.questions["eval"]
    assert rows.text(question.prompt).strip() == "blue"
    assert rows.text((*question.prompt, *question.reference)).strip() == "blue is a colour"


@pytest.mark.parametrize("make", [metaspace, lambda: metaspace("first"), lambda: sentencepiece("first"), llama_2])
def test_bytes_are_text_also_if_marked_as_special(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    labels = ["-4", "4", "[]", "()", "'s", "s", "中文", "x = {1}"]
    data = rows_of(tokenizer, *({"prompt": "What is 4 - 8?\n", "completion": label} for label in labels))
    rows = TokenizedQuestions(tokenizer, data)
    assert [rows.text(question.reference).strip() for question in rows.questions["eval"]] == labels
    for question in rows.questions["eval"]:
        assert rows.completions(question, labels) == [own.reference for own in rows.questions["eval"]]
    assert rows.end_token_ids() == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_labels_that_continue_a_word_are_text_without_marks(blank: str) -> None:
    tokenizer, labels = bert(), ["no", "yes"]
    data = rows_of(tokenizer, *({"prompt": f"is it {n} of", "completion": f"{blank}{labels[n % 2]}"} for n in range(4)))
    rows = TokenizedQuestions(tokenizer, data)
    task = read_task({"kind": "label_likelihood", "labels": ["yes", "no"]})
    TaskScorer(task, tokenizer, data, None)
    first, second, *_ = rows.questions["eval"]
    assert [rows.text(question.reference) for question in (first, second)] == labels
    assert rows.completions(first, labels) == [first.reference, second.reference]
    assert rows.completions(second, labels) == [first.reference, second.reference]


@pytest.mark.parametrize(
    ("make", "prompt", "labels", "message"),
    [
        (bert, "of", ["yes", "🙂"], r"task\.labels: '\[UNK\]': the tokenizer has only its unknown token"),
        (t5, "of: ", ["{x}", "yes"], r"task\.labels: '<unk>x<unk>': the tokenizer has only its unknown token"),
        (bert, "of", ["yes", ", no"], r"'yes': behind the prompt \.\.\.'of' its tokens depend on a blank"),
    ],
)
def test_labels_that_cannot_be_cut_as_in_training_are_refused(
    make: Callable[[], PreTrainedTokenizerFast], prompt: str, labels: list[str], message: str
) -> None:
    tokenizer = make()
    rows = [{"prompt": f"{prompt}{' ' if '🙂' in label else ''}", "completion": label} for label in labels]
    with pytest.raises(ValueError, match=message):
        TaskScorer(read_task({"kind": "label_likelihood"}), tokenizer, rows_of(tokenizer, *rows), None)


@pytest.mark.parametrize("likelihood", ["summed", "per_token"])
def test_likelihoods_are_those_of_the_trained_tokens(
    likelihood: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))
    save_tiny_llama(sentencepiece("first"), tmp_path / "model")
    labels = ["blue", "green", "r"]
    lines = [
        {"prompt": f"Name {n}{':' if n % 2 else ': '}", "completion": f"{' ' if n % 2 else ''}{labels[n % 3]}"}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    setup = make_setup(tmp_path / "model", tmp_path / "rows.jsonl", "float64")
    trials = [setup.trial("lora", {"rank": 4}, lr=0.02, steps=2)]
    run = run_pack(setup, trials)
    tokenizer: Any = load_tokenizer(setup.model)
    task = read_task({"kind": "label_likelihood", "likelihood": likelihood})
    assert isinstance(task, LabelLikelihood)
    scorer = TaskScorer(task, tokenizer, setup.rows, None)
    batches = build_batches(trials, setup.rows, run.model.base.device)
    found = scorer.score(run.model, batches, "eval", one_worker, frozen=True)["correct"][0].tolist()
    base = setup.base()
    for question, right in zip(scorer.questions["eval"], found, strict=True):
        assert bool(right) == (
            _likeliest(base, tokenizer, lines, question, labels, likelihood) == _own(tokenizer, question)
        )


def _own(tokenizer: Any, question: Question) -> str:
    return str(tokenizer.decode(list(question.reference), skip_special_tokens=True)).strip()


def _likeliest(
    base: Any, tokenizer: Any, lines: list[dict[str, str]], question: Question, labels: list[str], likelihood: str
) -> str:
    """Found without LoraGrid's rule: the label whose row, as `PairTokenizer` trains it, is the likeliest."""
    (line,) = [line for line in lines if tuple(tokenizer(line["prompt"])["input_ids"]) == question.prompt]
    blank = line["completion"][: len(line["completion"]) - len(line["completion"].lstrip())]
    scores = []
    for label in labels:
        (tokenized,) = PairTokenizer(tokenizer).tokenize([{"prompt": line["prompt"], "completion": f"{blank}{label}"}])
        assert isinstance(tokenized, tuple)
        ids, start = tokenized[0].input_ids, len(question.prompt)
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        score = -F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum").item()
        scores.append(score / (len(ids) - start) if likelihood == "per_token" else score)
    return labels[scores.index(max(scores))]
