"""Files of JSON give the rows that they hold, or say in which line they hold something else."""

import json
from pathlib import Path

import pandas
import pytest

from loragrid.data.bad_rows import BadRow
from loragrid.data.files.file_rows import FileRows
from loragrid.data.files.json_rows import read_json, read_jsonl

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c\u2028\n", "completion": "ä"}]


def lines(tmp_path: Path, content: str, suffix: str = ".jsonl") -> FileRows:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content.encode())
    return read_jsonl(path) if suffix == ".jsonl" else read_json(path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"a": 1, "a": 2}', 'an object has the key "a" more than once'),
        ('{"a": [{"b": 1, "b": 1}]}', 'an object has the key "b" more than once'),
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON value"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ('{"a": 1} {"a": 2}', "(one JSON object a line)"),
        ('{"a": 1}{"a": 2}', "(one JSON object a line)"),
        ('{"a": 1},', "(one JSON object a line)"),
        ('{"a": 1,}', "not JSON"),
        ("{'a': 1}", "not JSON"),
        ('{"a": "b\tc"}', "Invalid control character at character 9"),
        ('{"a": ', "not JSON"),
        ("// comment", "not JSON"),
        ("null", "null, not a JSON object"),
        ('"text"', "a text, not a JSON object"),
        ("[1]", "an array, not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_is_a_bad_row_with_its_line(tmp_path: Path, line: str, what: str) -> None:
    rows = lines(tmp_path, f'{{"a": 0}}\n\n{line}\n{{"a": 3}}\n')
    assert [*rows.broken] == [1]
    assert what in rows.broken[1].what
    assert [rows.place(number) for number in range(3)] == ["line 1", "line 3", "line 4"]
    assert rows.read([0, 2]) == [{"a": 0}, {"a": 3}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ROWS), r"line 1 begins a JSON array, .*; rename the file to \.json"),
        ("\n" + json.dumps(ROWS, indent=1), r"line 2 begins a JSON array"),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), r"begins in line 1 ends in line 4; allowed: one object"),
        (json.dumps({"data": ROWS}, indent=1), r"save the array in its key 'data' as a file of its own"),
        ('{"a": 1}\r{"a": 2}\r', r"line 1: its lines end with carriage returns alone"),
    ],
)
def test_other_json_than_objects_in_lines_is_refused_whole(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lines(tmp_path, content)


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_is_read(tmp_path: Path, indent: int | None) -> None:
    rows = lines(tmp_path, json.dumps(ROWS, indent=indent, ensure_ascii=False), ".json")
    assert rows.read([0, 1]) == ROWS
    assert rows.place(1) == ("line 1" if indent is None else "line 6")


def test_a_json_file_may_hold_objects_in_lines(tmp_path: Path) -> None:
    content = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert lines(tmp_path, content, ".json").read([0, 1]) == ROWS


def test_tables_of_pandas_are_read_or_refused_with_the_remedy(tmp_path: Path) -> None:
    frame = pandas.DataFrame(ROWS)
    frame.to_json(tmp_path / "rows.json", orient="records")
    assert read_json(tmp_path / "rows.json").read([0, 1]) == ROWS
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    assert read_jsonl(tmp_path / "rows.jsonl").read([0, 1]) == ROWS
    for suffix in (".json", ".jsonl"):
        for indent in (None, 1):
            frame.to_json(tmp_path / f"rows{suffix}", indent=indent)
            with pytest.raises(ValueError, match=r'to_json\(orient="records"\)'):
                lines(tmp_path, (tmp_path / f"rows{suffix}").read_text(), suffix)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": 2},\n]', "ends with a comma"),
        ('[{"a": 1}\n {"a": 2}]', "after the value that begins in line 1, a comma or the array's end is missing"),
        ('[{"a": 1}', "a comma or the array's end is missing"),
        ('[{"a": 1},\n\n{"a": 2, "a": 3}]', 'begins in line 3 is not JSON: an object has the key "a"'),
        ('[{"a": 1}][{"a": 2}]', "more than one JSON array"),
    ],
)
def test_a_broken_array_is_refused_with_the_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lines(tmp_path, content, ".json")


def test_a_value_of_an_array_that_is_no_row_is_bad(tmp_path: Path) -> None:
    rows = lines(tmp_path, '[{"a": 1},\n7,\n{"a": 2}]', ".json")
    assert [*rows.broken] == [1]
    assert rows.place(1) == "line 2"
    assert isinstance(rows.read([1])[0], BadRow)
