"""A single bad row is refused with its place, or left out and counted; a fault of the file is always refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.bad_rows import BadRowError
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.data.record import data_figures, data_record, data_tags
from loragrid.models.loading import load_tokenizer
from loragrid.trials.metrics import sweep_metrics
from loragrid.trials.row_notes import ROW_NOTES
from loragrid.trials.skip_reasons import BAD_ROW, BROKEN_LINE, EXCLUDED
from loragrid.trials.tags import EXAMPLES_TAG

PAIRS = [{"prompt": f"Question {number}:", "completion": f" answer {number}"} for number in range(12)]
GOOD = [json.dumps(row) for row in PAIRS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load(tmp_path: Path, tiny_llama_dir: Path) -> Any:
    """Loads lines, written to a file, with some `data` keys."""

    def load_lines(lines: Sequence[str], name: str = "rows.jsonl", **keys: Any) -> TokenizedData:
        model = ModelConfig(name=str(tiny_llama_dir))
        settings: dict[str, Any] = {"name": write(tmp_path / name, lines), "max_length": 64, "num_eval": 2} | keys
        return load_data(DataConfig(**settings), model, load_tokenizer(model))

    return load_lines


def write(path: Path, lines: Sequence[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', r"line 4: not JSON: an object has the key", BROKEN_LINE),
        ('{"prompt": "a", ', r"line 4: not JSON", BROKEN_LINE),
        ('{"prompt": "a", "completion": 7}', r"line 4, column completion: 7: not text", BAD_ROW),
        ('{"prompt": [{"role": "user"}], "completion": "c"}', r"line 4, column prompt: ", BAD_ROW),
    ],
)
def test_a_bad_line_of_json_is_refused_or_counted(load: Any, line: str, message: str, reason: str) -> None:
    lines = [*GOOD[:2], "", line, *GOOD[2:]]
    with pytest.raises(BadRowError, match=rf"data\.name: .*rows\.jsonl: {message}.*data\.on_bad_row: skip"):
        load(lines)
    data = load(lines, on_bad_row="skip")
    assert data.skipped == {reason: 1}
    assert len(data.train) + len(data.evaluation) == len(PAIRS)


def test_a_csv_row_with_other_fields_is_refused_or_counted(load: Any) -> None:
    lines = ["prompt,completion", *(f"Question {n}:,answer {n}" for n in range(9)), "Why:,red, and blue", "Oh:"]
    with pytest.raises(BadRowError, match=r"rows\.csv: line 11: has 3 fields, but line 1 names 2 columns"):
        load(lines, "rows.csv")
    data = load(lines, "rows.csv", on_bad_row="skip")
    assert data.skipped == {BROKEN_LINE: 2}
    figures = data_figures(data)
    assert (figures["data/skipped_broken_line"], figures["data/skipped_rows"]) == (2, 2)
    assert figures["data/skipped_share"] == pytest.approx(2 / 11)


@pytest.mark.parametrize("split", ["eval", "test"])
def test_rows_of_other_files_are_judged_alike(load: Any, tmp_path: Path, split: str) -> None:
    lines = [json.dumps({"prompt": f"New {n}:", "completion": " yes"}) for n in range(3)]
    keys = {f"{split}_name": write(tmp_path / "own.jsonl", [*lines, "{"]), "num_eval": 2, "num_test": 2}
    with pytest.raises(BadRowError, match=rf"data\.{split}_name: .*own\.jsonl: line 4: not JSON"):
        load(GOOD, **keys)
    data = load(GOOD, **keys | {f"num_{split}": 3}, on_bad_row="skip")
    assert set(data.skipped) <= {BROKEN_LINE}


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("rows.csv", ["prompt,completion", "a,b", 'c,"d', "e,f"], r"lines 3 to 4: a quote opens a field"),
        ("rows.csv", ["prompt,completion", "a,b", 'c,"d"e'], r"line 3: text follows a closing quote"),
        ("rows.csv", ["prompt;completion", "a;b"], r"line 1: its fields are separated by semicolons"),
        ("rows.csv", ["prompt,prompt", "a,b"], r"line 1: several columns"),
        ("rows.jsonl", [json.dumps(PAIRS, indent=1)], r"line 1 begins a JSON array"),
        ("rows.jsonl", ["{", "{"], r"line 1: not JSON.*; every row is like this"),
    ],
)
def test_a_fault_of_the_file_is_refused_even_with_skip(load: Any, name: str, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(lines, name, on_bad_row="skip")


def test_a_chat_with_an_unknown_role_is_refused_with_its_line(load: Any) -> None:
    answer = {"role": "GPT", "content": "b"}
    good = [json.dumps({"messages": [{"role": "Human", "content": str(number)}, answer]}) for number in range(6)]
    bad = json.dumps({"messages": [{"role": "user", "content": "c"}, answer, {"role": "wizard", "content": "c"}]})
    with pytest.raises(BadRowError, match=r"line 5, column messages: message 3 has the unknown role 'wizard'; allowed"):
        load([*good[:4], bad, *good[4:]])


def test_rows_that_exclude_themselves_are_counted(load: Any) -> None:
    lines = [json.dumps(row | {"weight": int(number != 3)}) for number, row in enumerate(PAIRS)]
    data = load(lines)
    assert data.skipped == {EXCLUDED: 1}
    assert len(data.train) == len(PAIRS) - 3


def test_what_the_reader_noticed_is_counted(load: Any) -> None:
    lines = ["prompt,completion", *(f"Question {n}:,answer {n}" for n in range(5)), 'Why:,"a', "b,c", 'd,e"']
    assert load(lines, "rows.csv").notes == {"lines_like_rows": 1}


def test_held_out_text_is_refused_with_its_line(load: Any, tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", ['{"text": "a b c"}', '{"text": 3}'])
    with pytest.raises(BadRowError, match=r"data\.forgetting_name: .*line 2: column text: 3: not text"):
        load(GOOD, forgetting_name=text, on_bad_row="skip")


def test_the_recognised_shape_is_part_of_the_record(load: Any, tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", [json.dumps({"question": f"New {n}", "answer": "b"}) for n in range(3)])
    data = load([json.dumps(row | {"id": "7"}) for row in PAIRS], eval_name=own)
    assert data.made_from["shapes"] == {
        "train": "prompt and completion (prompt, completion); not used: id",
        "evaluation": "question and answer (question, answer)",
    }


def test_every_reason_and_note_is_a_metric() -> None:
    assert {"data/skipped_broken_line", "data/skipped_bad_row", "data/skipped_excluded"} <= set(sweep_metrics())
    assert {f"data/noted_{name}" for name in ROW_NOTES} | {"data/kept_apart_surplus_turns"} <= set(sweep_metrics())


def test_what_skipped_rows_are_refused_for_is_said_and_recorded(load: Any) -> None:
    bad = [{"prompt": "a", "completion": number} for number in (7, 8)] + [{"prompt": {"b": 1}, "completion": "c"}]
    data = load([*GOOD, *(json.dumps(row) for row in bad), "{"], on_bad_row="skip")
    assert data.skipped == {BAD_ROW: 3, BROKEN_LINE: 1}
    (two, first), (one, second) = data.examples[BAD_ROW]
    assert (two, one) == (2, 1)
    assert first in [f"line {12 + number}, column completion: {6 + number}: not text" for number in (1, 2)]
    assert second == "line 15, column prompt: {'b': 1}: not text"
    line = data_record(data, 64).lines()[0]
    assert f"3 {BAD_ROW} (2 such as {first}; 1 such as {second})" in line
    assert f"1 {BROKEN_LINE} (such as line 16: not JSON" in line
    assert json.loads(data_tags(data)[EXAMPLES_TAG])[BAD_ROW] == [[2, first], [1, second]]
    again = load([*GOOD, *(json.dumps(row) for row in bad), "{"], on_bad_row="skip")
    assert data_record(again, 64).lines()[0] == line  # from the cache


def test_what_the_template_says_is_shown_with_skip(load: Any, tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role here') }}{% endif %}"
    template += "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    (tmp_path / "own.jinja").write_text(template, encoding="utf-8")
    keys = {"on_bad_row": "skip", "chat_template": str(tmp_path / "own.jinja"), "num_eval": 1}
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    lines = [json.dumps({"messages": turns}) for _ in range(4)]
    with pytest.raises(ValueError, match=rf"4 {BAD_ROW} \(such as line \d, column messages: .*No system role here"):
        load(lines, **keys)


@pytest.mark.parametrize(
    ("row", "other"),
    [
        ({"prompt": "a", "completion": 7}, r"other columns \(data\.columns\)"),
        ({"prompt": {"a": 1}, "completion": "b"}, r"other columns \(data\.columns\)"),
        ({"text": ["a"]}, r"other columns \(data\.columns\)"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, r"another template \(data\.chat_template\)"),
    ],
)
def test_no_single_row_is_blamed_for_what_all_have(load: Any, row: dict[str, Any], other: str) -> None:
    with pytest.raises(BadRowError, match=rf"each of the first 5 rows is refused: mend the file, or choose {other}"):
        load([json.dumps(row)] * 5)
    with pytest.raises(BadRowError, match=r"mend the row, or leave such rows out"):
        load([*GOOD, *[json.dumps({"prompt": "a", "completion": 7})] * 30])
