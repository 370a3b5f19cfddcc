"""Rows become tokens and labels of static shape; the rows of a step are a pure function of seed and step."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData, TokenRows, batch_indices, load_data
from loragrid.data.tokenization import RowTokenizer
from loragrid.models.cache import cached_folder
from loragrid.models.loading import load_tokenizer

TEMPLATE_THAT_DROPS_EARLIER_ANSWERS = (
    "{% for message in messages %}{% if message['role'] != 'assistant' or loop.last %}<|start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEMPLATE_WITH_DATE = (
    "<|start|>system\n{{ strftime_now('%d %B %Y') }}<|end|>\n{% for message in messages %}<|start|>"
    "{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PAIRS = [{"prompt": f"Question {number}:", "completion": f" answer {number} to it"} for number in range(12)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tiny_llama_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_llama_dir))


@pytest.fixture
def tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)


def write_jsonl(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled_texts(rows: TokenRows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode(targets[targets >= 0])) for targets in rows.label_targets]


def as_set(rows: TokenRows) -> set[tuple[int, ...]]:
    return {tuple(ids) for ids in rows.input_ids.tolist()}


class Loader:
    """Writes rows to a file and loads them, with 2 eval rows of at most 128 tokens where nothing else is said."""

    def __init__(self, folder: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.model, self.tokenizer = folder, model, tokenizer

    def __call__(self, rows: Sequence[object], **fields: Any) -> TokenizedData:
        return self.file(write_jsonl(self.folder / "rows.jsonl", rows), **fields)

    def file(self, name: str, **fields: Any) -> TokenizedData:
        settings = {"max_length": 128, "num_eval": 2} | fields
        return load_data(DataConfig(name=name, **settings), self.model, self.tokenizer)


@pytest.fixture
def load(tmp_path: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Loader:
    return Loader(tmp_path, model, tokenizer)


# Tokens and labels


def test_completion_and_end_token_are_the_labels_of_a_pair(load: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(PAIRS)
    texts = labelled_texts(data.train, tokenizer) + labelled_texts(data.evaluation, tokenizer)
    assert sorted(texts) == sorted(row["completion"] + "<|end|>" for row in PAIRS)
    whole = [
        tokenizer.decode(ids[:length]) for ids, length in zip(data.train.input_ids, data.train.num_tokens, strict=True)
    ]
    assert set(whole) <= {row["prompt"] + row["completion"] + "<|end|>" for row in PAIRS}


def test_every_label_is_the_token_after_its_position(load: Loader) -> None:
    rows = load(PAIRS).train
    following = rows.input_ids.gather(1, rows.label_positions + 1)
    real = rows.label_targets >= 0
    assert torch.equal(following[real], rows.label_targets[real])
    assert rows.num_labels == int(real.sum())
    assert (rows.label_positions[~real] == 0).all()
    assert (rows.label_targets[~real] == -100).all()


def test_shapes_fit_the_longest_row_of_all_splits(load: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(PAIRS)
    both = torch.cat([data.train.num_tokens, data.evaluation.num_tokens])
    assert data.train.input_ids.shape == (10, int(both.max()))
    assert data.evaluation.input_ids.shape == (2, int(both.max()))
    num_labels = torch.cat([(rows.label_targets >= 0).sum(1) for rows in (data.train, data.evaluation)])
    assert data.train.label_targets.shape == data.train.label_positions.shape == (10, int(num_labels.max()))
    assert {tensor.dtype for tensor in vars(data.train).values()} == {torch.int64}
    for ids, length in zip(data.train.input_ids, data.train.num_tokens, strict=True):
        assert (ids[length:] == tokenizer.pad_token_id).all()
        assert (ids[:length] != tokenizer.pad_token_id).all()


def test_text_and_loss_on_all_label_every_token(load: Loader) -> None:
    for rows, fields in (([{"text": f"Some text {n}"} for n in range(5)], {}), (PAIRS, {"loss_on": "all"})):
        train = load(rows, **fields).train
        assert torch.equal((train.label_targets >= 0).sum(1), train.num_tokens - 1)
        first = train.num_tokens[0]
        assert torch.equal(train.label_targets[0, : first - 1], train.input_ids[0, 1:first])


def test_labels_of_a_chat_are_the_assistant_turns(load: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    chats = [
        [
            ("system", "Be brief."),
            ("user", f"One {n}?"),
            ("assistant", f"Yes {n}."),
            ("user", "Two?"),
            ("assistant", "No."),
        ]
        for n in range(4)
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    data = load(rows)
    texts = labelled_texts(data.train, tokenizer) + labelled_texts(data.evaluation, tokenizer)
    assert sorted(texts) == [f"Yes {n}.<|end|>No.<|end|>" for n in range(4)]
    rendered = {tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows}
    whole = {
        tokenizer.decode(ids[:length]) for ids, length in zip(data.train.input_ids, data.train.num_tokens, strict=True)
    }
    assert whole <= rendered


def chat(question: str, *answers: str) -> dict[str, Any]:
    turns = [turn for answer in answers for turn in (("user", question), ("assistant", answer))]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_chat_whose_template_rewrites_earlier_turns_is_skipped_and_counted(
    load: Loader, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = TEMPLATE_THAT_DROPS_EARLIER_ANSWERS
    rows = [*(chat(f"Well {n}?", "Yes.") for n in range(4)), chat("Well?", "Yes.", "No."), chat("Oh?", "A", "B")]
    data = load(rows, turns="all")
    assert data.skipped == {"earlier turns rewritten by the chat template": 2}


def test_a_chat_template_always_gets_the_same_date(load: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATE_WITH_DATE
    data = load([chat(f"Well {n}?", "Yes.") for n in range(4)])
    length = data.train.num_tokens[0]
    start = "<|start|>system\n26 July 2024<|end|>\n<|start|>user\nWell "
    assert str(tokenizer.decode(data.train.input_ids[0, :length])).startswith(start)


def test_chat_template_is_part_of_what_is_cached(load: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [chat(f"Well {n}?", "Yes.") for n in range(4)]
    before = load(rows)
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|start|>", "<|start|><|start|>")
    assert load(rows).digest != before.digest


def test_added_special_tokens_stay_at_the_start_only(load: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import processors

    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|start|>", "<|end|>")]
    adding = processors.TemplateProcessing(single="<|start|> $A <|end|>", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = adding
    data = load([{"prompt": f"Q{n}", "completion": " A"} for n in range(4)])
    length = data.train.num_tokens[0]
    assert str(tokenizer.decode(data.train.input_ids[0, :length])) in {f"<|start|>Q{n} A<|end|>" for n in range(4)}


# Rows that are left out


def test_rows_that_cannot_be_used_are_counted_with_their_reason(load: Loader) -> None:
    odd: list[dict[str, Any]] = [
        {"prompt": "Long", "completion": " word" * 200},
        {"prompt": "Nothing", "completion": ""},
        {"prompt": "Null", "completion": None},
        {"prompt": None, "completion": " No question"},
        {"completion": " No question at all"},
    ]
    data = load([*PAIRS, *odd])
    assert data.skipped == {"longer than max_length": 1, "empty completion": 2, "empty prompt": 2}
    assert len(data.train) + len(data.evaluation) == len(PAIRS)
    assert data.num_source_rows == len(PAIRS) + len(odd)


def test_chat_without_an_assistant_turn_is_skipped_and_counted(load: Loader) -> None:
    silent = {"messages": [{"role": "user", "content": "Hello?"}]}
    data = load([*(chat(f"Well {n}?", "Yes.") for n in range(4)), silent, {"messages": []}, {"messages": None}])
    assert data.skipped == {"without a token to learn": 1, "empty messages": 2}
    others = [{"messages": [{"role": "user", "content": f"Hello {n}?"}]} for n in range(4)]
    assert load(others, loss_on="all").skipped == {}


def test_row_of_exactly_max_length_is_kept(load: Loader) -> None:
    longest = int(load(PAIRS).train.num_tokens.max())
    assert load(PAIRS, max_length=longest).skipped == {}
    assert load(PAIRS, max_length=longest - 1).skipped["longer than max_length"] > 0


# Which rows are taken


def test_repeated_eval_rows_are_not_trained_on(load: Loader) -> None:
    data = load([*PAIRS, *PAIRS], num_eval=6)
    assert not as_set(data.train) & as_set(data.evaluation)
    assert len(data.train) + len(data.evaluation) + sum(data.skipped.values()) == 2 * len(PAIRS)


def test_eval_rows_do_not_depend_on_num_train(load: Loader) -> None:
    few, many = load(PAIRS, num_train=3), load(PAIRS)
    assert (len(few.train), len(many.train)) == (3, 10)
    assert [row[row > 0].tolist() for row in few.evaluation.input_ids] == [
        row[row > 0].tolist() for row in many.evaluation.input_ids
    ]


def test_skipped_rows_are_replaced_until_the_wanted_number_is_reached(load: Loader) -> None:
    rows = [row for pair in PAIRS for row in (pair, {"prompt": "Nothing", "completion": ""})]
    data = load(rows, num_eval=4, num_train=8)
    assert (len(data.train), len(data.evaluation)) == (8, 4)


def test_only_as_many_rows_are_tokenized_as_are_wanted(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    tokenize = RowTokenizer.tokenize

    def counted(self: RowTokenizer, rows: Any) -> Any:
        seen.extend(row["text"] for row in rows)
        return tokenize(self, rows)

    monkeypatch.setattr(RowTokenizer, "tokenize", counted)
    load([{"text": f"Text {n}"} for n in range(500)], num_train=5, num_eval=3)
    assert len(seen) == len(set(seen)) == 8


def test_eval_rows_can_come_from_a_file_of_their_own(
    load: Loader, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    held_out = [{"prompt": "Held out:", "completion": f" {n}"} for n in range(3)]
    data = load(PAIRS, eval_name=write_jsonl(tmp_path / "eval.jsonl", [*held_out, PAIRS[0]]), num_eval=4)
    assert " 2<|end|>" in labelled_texts(data.evaluation, tokenizer)
    assert len(data.train) == len(PAIRS) - 1
    assert data.skipped == {"in the group of an eval row": 1}


# Sources


def test_every_format_yields_the_same_tokens(load: Loader, tmp_path: Path) -> None:
    rows = [{"prompt": f'A, "{n}"\nand 007?', "completion": "NA"} for n in range(9)]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    digests = {load(rows).digest, load.file(str(tmp_path / "rows.csv")).digest}
    assert {*digests, load.file(str(tmp_path / "rows.parquet")).digest} == digests
    assert len(digests) == 1


def test_chat_from_parquet_is_the_same_as_from_jsonl(load: Loader, tmp_path: Path) -> None:
    rows = [chat(f"Well {n}?", "Yes.") for n in range(4)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    assert load.file(str(tmp_path / "rows.parquet")).digest == load(rows).digest


@pytest.mark.skipif(importlib.util.find_spec("chitchat_dataset") is None, reason="chitchat-dataset is not installed")
def test_embedded_chitchat_gives_turns_and_their_answers(load: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load.file("chitchat", num_train=6)
    assert data.num_source_rows == 131_548
    assert (len(data.train), len(data.evaluation)) == (6, 2)
    assert all(text.endswith("<|end|>") for text in labelled_texts(data.train, tokenizer))


def test_columns_can_be_mapped(load: Loader) -> None:
    renamed = [{"question": row["prompt"], "reply": row["completion"], "text": "other"} for row in PAIRS]
    mapped = load(renamed, columns={"prompt": "question", "completion": "reply"})
    assert mapped.digest == load(PAIRS).digest


# Same tokens everywhere, made once


@pytest.mark.heavy
def test_digest_is_the_same_in_every_process(tmp_path: Path, model: ModelConfig, load: Loader) -> None:
    import loragrid

    path = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    script = (
        "import sys; from loragrid.config.experiment import *; from loragrid.data.dataset import *\n"
        "from loragrid.models.loading import load_tokenizer\n"
        "model = ModelConfig(name=sys.argv[2]); data = DataConfig(name=sys.argv[1], max_length=128, num_eval=2)\n"
        "print(load_data(data, model, load_tokenizer(model)).digest, batch_indices(10, 8, 3, 5).tolist())"
    )
    roots = [str(Path(next(iter(loragrid.__path__))).parent), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONHASHSEED": "7", "LORAGRID_CACHE": str(tmp_path / "other-cache")}
    done = subprocess.run(
        [sys.executable, "-c", script, path, model.name],
        env=os.environ | settings | {"PYTHONPATH": os.pathsep.join(filter(None, roots))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"{load.file(path).digest} {batch_indices(10, 8, 3, 5).tolist()}"
    assert done.stderr == ""


def test_second_load_takes_the_stored_tokens(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(PAIRS, max_length=24)

    def refuse(self: RowTokenizer, rows: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(RowTokenizer, "tokenize", refuse)
    second = load(PAIRS, max_length=24)
    assert (second.digest, second.skipped, second.num_source_rows) == (first.digest, first.skipped, 12)
    for part in ("train", "evaluation"):
        for name, tensor in vars(getattr(first, part)).items():
            assert torch.equal(tensor, getattr(getattr(second, part), name)), (part, name)
    with pytest.raises(AssertionError, match="tokenized again"):
        load([*PAIRS, {"prompt": "New", "completion": " row"}], max_length=24)


def test_unfinished_cache_folder_is_never_seen(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("out of space")

    with pytest.raises(RuntimeError, match="out of space"):
        cached_folder(tmp_path / "made", fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    made = cached_folder(tmp_path / "made", lambda folder: (folder / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]
    assert cached_folder(tmp_path / "made", fail) == made


# What is refused


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([], {}, r"data\.name: .*rows\.jsonl: has no rows"),
        ([{"a": "1", "b": "2"}], {}, r"has the columns a, b; allowed: messages, prompt\+completion or text"),
        (
            PAIRS,
            {"columns": {"text": "body"}},
            r"has no column body \(needed for text\); its columns: prompt, completion",
        ),
        (PAIRS, {"columns": {"prompt": "prompt", "text": "body"}}, r"data\.columns: prompt, text: belong to different"),
        (
            [{"prompt": "a", "completion": "b", "text": "c"}],
            {},
            r"prompt and completion .* or text \(text\); choose one, for example data\.shape: prompt_completion",
        ),
        ([{"text": 42}], {}, r"rows\.jsonl: line 1, column text: 42: not text"),
        ([{"messages": "hello"}], {}, r"line 1, column messages: 'hello': not a list of messages"),
        (
            [{"messages": [{"role": "user"}]}],
            {},
            r"line 1, column messages: message 1 \(user\) has no content",
        ),
        ([["a"]], {}, r"rows\.jsonl: line 1: an array, not a JSON object"),
        (PAIRS, {"max_length": 129}, r"data\.max_length: 129: longer than the context of .*; allowed: at most 128"),
        (PAIRS, {"max_length": 2}, r"none of its 12 rows can be used \(skipped: 12 longer than max_length\)"),
        (PAIRS, {"num_eval": 13}, r"data\.num_eval: 13: .*rows\.jsonl has only 12 rows"),
        (PAIRS, {"num_eval": 12}, r"apart from the 12 eval rows \(data\.num_eval\), none of its 12 rows can be used"),
        (PAIRS, {"num_train": 11}, r"data\.num_train: 11: .*rows\.jsonl has only 10 train rows"),
        (PAIRS, {"revision": "v1"}, r"data\.revision: v1: .*rows\.jsonl is not on the hub"),
        (PAIRS, {"split": "test"}, r"data\.split: test: .*rows\.jsonl is not on the hub"),
        (PAIRS, {"eval_split": "test"}, r"data\.eval_split: test: .*rows\.jsonl is not on the hub"),
        (PAIRS, {"eval_name": "absent.jsonl"}, r"data\.eval_name: absent\.jsonl: there is no such file in /"),
        (
            PAIRS,
            {"eval_name": "some/hub-id"},
            r"data\.eval_name: some/hub-id: not a local \.jsonl, \.json, \.csv or \.parquet",
        ),
    ],
)
def test_bad_rows_and_settings_are_refused_with_key_and_reason(
    load: Loader, rows: Sequence[object], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(rows, **fields)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"data\.name: .*broken\.jsonl: line 2: not JSON"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', r"data\.name: .*latin\.jsonl: .*utf-8"),
        ("empty.csv", b"", r"data\.name: .*empty\.csv: has no rows"),
        ("head.csv", b"text\n", r"data\.name: .*head\.csv: has no rows"),
        ("ragged.csv", b"text,more\na,b\na,b,c,d\n", r"data\.name: .*ragged\.csv: "),
        ("not.parquet", b"text", r"data\.name: .*not\.parquet: "),
        ("rows.txt", b"text", r"data\.name: .*rows\.txt: cannot be read; allowed are local files that end in \.jsonl"),
    ],
)
def test_unreadable_files_are_refused(load: Loader, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load.file(str(tmp_path / name))


def test_absent_file_is_refused(load: Loader, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.name: .*absent\.csv: there is no such file"):
        load.file(str(tmp_path / "absent.csv"))


def test_chat_for_a_tokenizer_without_a_template_is_refused(load: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"holds chat messages, but the tokenizer of .* has no chat template"):
        load([chat("A", "B")] * 4)


def test_chat_that_the_template_refuses_is_named(load: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match=r"rows\.jsonl: line \d, column messages: the chat template refuses it: roles must alternate"
    ):
        load([chat("A", "B")] * 4)


# Batches


def test_an_epoch_takes_every_row_once_in_its_order() -> None:
    steps = torch.cat([batch_indices(10, 4, seed=0, step=step) for step in range(5)])
    first, second = steps[:10].tolist(), steps[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    state = torch.random.get_rng_state()
    batch = batch_indices(100, 8, seed=3, step=40)
    torch.rand(3)
    assert torch.equal(batch_indices(100, 8, seed=3, step=40), batch)
    assert not torch.equal(batch_indices(100, 8, seed=4, step=40), batch)
    assert not torch.equal(batch_indices(100, 8, seed=3, step=41), batch)
    torch.random.set_rng_state(state)
    batch_indices(100, 8, seed=3, step=40)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_batch_may_be_larger_than_the_rows() -> None:
    batch = batch_indices(3, 7, seed=0, step=0)
    assert sorted(batch[:3].tolist()) == sorted(batch[3:6].tolist()) == [0, 1, 2]
    assert batch.shape == (7,)


def test_batches_of_every_size_walk_through_the_same_rows() -> None:
    by_two = torch.cat([batch_indices(10, 2, seed=1, step=step) for step in range(12)])
    by_eight = torch.cat([batch_indices(10, 8, seed=1, step=step) for step in range(3)])
    assert torch.equal(by_two, by_eight)


def test_selected_rows_are_those_asked_for_in_that_order(load: Loader) -> None:
    rows = load(PAIRS).train
    chosen = rows.select(torch.tensor([4, 1, 4]))
    assert len(chosen) == 3
    for name, tensor in vars(chosen).items():
        assert torch.equal(tensor, torch.stack([getattr(rows, name)[index] for index in (4, 1, 4)])), name
