"""No group of rows is in two splits; what splits share all the same is counted."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.data.groups import group_of
from loragrid.data.tokenization import RowTokenizer
from loragrid.models.loading import load_tokenizer

SPLITS = ("train", "evaluation", "test")
ANSWERS = ("yes", "no", "perhaps", "never", "always")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load(tmp_path: Path, tiny_llama_dir: Path) -> Any:
    """Loads rows, written to a file, as they are split with some `data` keys."""

    def load_rows(rows: Sequence[object], **keys: Any) -> TokenizedData:
        model = ModelConfig(name=str(tiny_llama_dir))
        settings: dict[str, Any] = {"name": write(tmp_path / "rows.jsonl", rows), "max_length": 64} | keys
        return load_data(DataConfig(**settings), model, load_tokenizer(model))

    return load_rows


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def repeated_prompts(num_prompts: int, copies: int) -> list[dict[str, Any]]:
    """Every prompt with several completions, as in data sets with several references."""
    return [
        {"prompt": f"Question {number}:", "completion": f" {ANSWERS[copy]}", "topic": number % 10, "id": number}
        for number in range(num_prompts)
        for copy in range(copies)
    ]


def chat(*turns: str) -> dict[str, Any]:
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


def groups(data: TokenizedData) -> dict[str, set[str]]:
    return {split: set(getattr(data, split).group_digests()) for split in SPLITS}


def no_group_in_two_splits(data: TokenizedData) -> bool:
    return not any(first & second for first, second in itertools.combinations(groups(data).values(), 2))


def sizes(data: TokenizedData) -> list[int]:
    return [len(getattr(data, split)) for split in SPLITS]


def test_rows_with_equal_prompts_are_in_one_split(load: Any) -> None:
    data = load(repeated_prompts(100, 5), num_eval=30, num_test=60)
    assert no_group_in_two_splits(data)
    assert sizes(data)[1:] == [30, 60]
    assert data.overlap["test_prompts_in_train"] == data.overlap["eval_prompts_in_train"] == 0
    assert data.overlap["test_answers_in_train"] == 60
    # Ten groups may be drawn for 30 eval rows, twenty for 60 test rows; what these have left over trains nothing.
    assert [getattr(data, split).num_groups for split in SPLITS] == [70, 10, 20]
    assert data.skipped == {"in the group of an eval row": 20, "in the group of a test row": 40}
    assert len(data.train) == 350


def test_rows_of_distinct_prompts_are_drawn_as_single_rows(load: Any) -> None:
    rows = repeated_prompts(40, 1)
    by_prompt, by_row = load(rows, num_eval=9, num_test=7), load(rows, num_eval=9, num_test=7, group_by="id")
    for split in SPLITS:
        assert getattr(by_prompt, split).digests() == getattr(by_row, split).digests()
    assert by_prompt.skipped == {}
    assert sizes(by_prompt) == [24, 9, 7]


def test_a_column_can_name_the_groups(load: Any) -> None:
    data = load(repeated_prompts(100, 2), num_eval=10, num_test=20, group_by="topic")
    assert no_group_in_two_splits(data)
    assert [getattr(data, split).num_groups for split in SPLITS] == [7, 1, 2]
    assert data.digest != load(repeated_prompts(100, 2), num_eval=10, num_test=20).digest


def test_an_unknown_column_is_refused_with_those_there_are(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.group_by: speaker: data\.name: .*allowed: prompt, completion, topic"):
        load(repeated_prompts(9, 1), num_eval=2, group_by="speaker")
    own = write(tmp_path / "eval.jsonl", [{"prompt": "A", "completion": "b"}])
    with pytest.raises(ValueError, match=r"data\.group_by: topic: data\.eval_name: .*allowed: prompt, completion, or"):
        load(repeated_prompts(9, 1), num_eval=1, group_by="topic", eval_name=own)


def test_a_row_without_a_value_is_grouped_by_its_prompt(load: Any) -> None:
    row = {"prompt": "A  question", "completion": " yes"}
    for nothing in (None, ""):
        assert group_of(row, nothing) == group_of({"prompt": "A question"})
    assert group_of(row, 7) == group_of(row, "7")
    assert group_of(row, 7) != group_of(row, 8)


def test_groups_are_kept_apart_across_files(load: Any, tmp_path: Path) -> None:
    rows = repeated_prompts(20, 3)
    eval_name, test_name = write(tmp_path / "e.jsonl", rows[:6:2]), write(tmp_path / "t.jsonl", rows[4:20:3])
    data = load(rows, eval_name=eval_name, test_name=test_name, num_eval=3, num_test=4)
    assert no_group_in_two_splits(data)
    assert len(data.train) == 60 - 3 * data.evaluation.num_groups - 3 * data.test.num_groups
    assert set(data.skipped) == {"in the group of an eval row", "in the group of a test row"}


def test_chats_that_begin_alike_are_one_group(load: Any) -> None:
    # Every answer of a chat is learnt, so the first shared prompt makes chats dependent, however they go on.
    rows = [
        chat(f"Hello {number}", "Hi", *(f"And {turn}?" for turn in range(length)))
        for number in range(40)
        for length in (0, 2, 4)
    ]
    data = load(rows, num_eval=8, num_test=12)
    assert no_group_in_two_splits(data)
    assert sum(getattr(data, split).num_groups for split in SPLITS) == 40
    assert data.overlap["test_prompts_in_train"] == 0
    greeted = [{"messages": [{"role": "assistant", "content": "Hello"}, *row["messages"]]} for row in rows]
    assert sum(getattr(load(greeted, num_eval=8, num_test=12), split).num_groups for split in SPLITS) == 40


def test_a_group_of_most_rows_stays_in_train(load: Any) -> None:
    rows = [
        *({"prompt": "Hi", "completion": f" {number}"} for number in range(160)),
        *({"prompt": f"Question {number}:", "completion": " yes"} for number in range(40)),
    ]
    data = load(rows, num_eval=10, num_test=20)
    assert data.evaluation.num_groups == 10
    assert data.test.num_groups == 20
    assert (len(data.train), data.skipped) == (170, {})


def test_one_group_for_all_rows_is_refused_with_the_remedy(load: Any) -> None:
    rows = [{"prompt": "Tell me a joke", "completion": f" number {number}"} for number in range(30)]
    with pytest.raises(ValueError, match=r"28 in the group of an eval row.*data\.group_by can name a column with more"):
        load(rows, num_eval=2)
    with pytest.raises(ValueError, match=r"none of its 30 rows.*\(skipped: 28 in the group of an eval.*data\.group_by"):
        load(rows, num_eval=2, num_test=2)
    assert sizes(load(rows, num_eval=2, num_test=3, group_by="completion")) == [25, 2, 3]


def test_the_wanted_number_is_reached_with_more_groups(load: Any) -> None:
    data = load(repeated_prompts(10, 4), num_eval=16, num_test=12)
    assert sizes(data)[1:] == [16, 12]
    assert no_group_in_two_splits(data)
    assert data.evaluation.num_groups == 4


def test_plain_text_is_grouped_by_its_text(load: Any) -> None:
    rows = [{"text": f"Text  {number // 2}"} for number in range(40)]
    data = load(rows, num_eval=4, num_test=4)
    assert no_group_in_two_splits(data)
    assert data.overlap == dict.fromkeys(data.overlap, 0)
    assert len(data.overlap) == 8


def test_shared_prompts_and_answers_are_counted(load: Any, tmp_path: Path) -> None:
    train = [chat("How are you?", "Fine."), chat("Be brief", "Right"), chat("A", "B", "C", "D")]
    test = [
        chat("Fine.", "How are  you?"),  # the question is an answer of train, the answer a question
        chat("New", "Fine."),  # the answer is one of train
        chat("A", "Else"),  # the prompt is one of train
        chat("New too", "D"),
        chat("New three", "C"),
    ]
    rows = [row | {"id": str(number)} for number, row in enumerate([*train, *test])]
    test_name = write(tmp_path / "t.jsonl", rows[3:])
    eval_name = write(tmp_path / "e.jsonl", [chat("None", "of it") | {"id": "9"}])
    data = load(rows[:3], test_name=test_name, eval_name=eval_name, num_eval=1, num_test=5, group_by="id")
    assert data.overlap == {
        "eval_prompts_in_train": 0,
        "eval_prompts_in_train_answers": 0,
        "eval_answers_in_train": 0,
        "eval_answers_in_train_prompts": 0,
        "test_prompts_in_train": 1,
        "test_prompts_in_train_answers": 1,
        "test_answers_in_train": 2,
        "test_answers_in_train_prompts": 2,
    }


def test_only_free_rows_are_tokenized(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    tokenize = RowTokenizer.tokenize

    def counted(self: RowTokenizer, rows: Any) -> Any:
        seen.update(row["prompt"] + row["completion"] for row in rows)
        return tokenize(self, rows)

    monkeypatch.setattr(RowTokenizer, "tokenize", counted)
    load(repeated_prompts(100, 5), num_train=20, num_eval=10, num_test=30)
    assert sum(seen.values()) == len(seen) == 60


def test_groups_survive_the_cache_and_selection(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(repeated_prompts(100, 5), num_eval=10, num_test=30)
    monkeypatch.setattr(RowTokenizer, "tokenize", None)
    second = load(repeated_prompts(100, 5), num_eval=10, num_test=30)
    assert groups(second) == groups(first)
    assert (second.overlap, second.made_from) == (first.overlap, first.made_from)
    some = first.test.select(first.test.num_tokens.argsort()[:5])
    assert set(some.group_digests()) <= groups(first)["test"]


@pytest.mark.heavy
def test_groups_are_the_same_in_every_process() -> None:
    script = "from loragrid.data.groups import group_of; print(group_of({'prompt': 'x'}))"
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=True)
    assert int(done.stdout) == group_of({"prompt": "x"})


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("chitchat_dataset") is None, reason="chitchat-dataset is not installed")
def test_a_conversation_of_chitchat_is_one_group(load: Any) -> None:
    data = load([], name="chitchat", num_train=500, num_eval=16, num_test=64)
    assert no_group_in_two_splits(data)
    assert data.test.num_groups > 40
    assert data.overlap["test_answers_in_train_prompts"] < 10  # with single rows as groups most of the 64


def test_equal_prompts_that_lack_a_column_are_told_so(load: Any) -> None:
    rows = [{"instruction": "Translate", "source": f"x{n}", "response": f"y{n}"} for n in range(8)]
    with pytest.raises(ValueError, match=r"never in two splits.*because they lack a column.*\(not used: source\)"):
        load(rows, num_eval=2)
    with pytest.raises(ValueError, match=r"never in two splits: data\.group_by can name a column with more values$"):
        load([{"instruction": row["instruction"], "response": row["response"]} for row in rows], num_eval=2)
