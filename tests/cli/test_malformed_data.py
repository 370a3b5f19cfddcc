"""A malformed data file is refused with exit code 2; the message names the key, the file and the place in it."""

import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from loragrid.data.files.text_lines import MAX_LINE_BYTES
from tests.support.refusals import Refuses, Write

GIGABYTE = 2**30

Make = Callable[[Path], object]


def holding(content: str | bytes) -> Make:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def twelve(row: object) -> Make:
    return holding(f"{json.dumps(row)}\n" * 12)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, GIGABYTE)


def saying(*turns: object) -> Make:
    return twelve({"messages": list(turns)})


def table(**columns: object) -> Make:
    return lambda path: parquet.write_table(pyarrow.table(columns), path)


def spoilt_table(start: int, end: int, content: bytes) -> Make:
    def make(path: Path) -> None:
        table(text=["some text"] * 20)(path)
        whole = bytearray(path.read_bytes())
        whole[start:end] = content
        path.write_bytes(whole)

    return make


NO_TEXT = pyarrow.array([b"\xff\xfe"] * 20, pyarrow.binary()).view(pyarrow.string())
YEAR_146_MILLION = pyarrow.array([2**62] * 20, pyarrow.timestamp("ms"))
LONG_LINE = "line 1 is longer than 32 MiB; allowed: one row a line"

DATA: list[tuple[str, Make, str]] = [
    ("binary.jsonl", holding(b"\x80\x81" * 500), "line 1 is not text in UTF-8"),
    ("nul.jsonl", holding(b"\0" * 1000), "is not text in UTF-8: its first bytes"),
    ("nul_inside.jsonl", holding(b'{"text": "a\0b"}\n'), "line 1 holds a NUL character"),
    ("long_line.jsonl", sparse, LONG_LINE),
    ("cut.jsonl", holding('{"text": "a"}\n{"text": "b'), "line 2: not JSON: "),
    ("latin.jsonl", holding(b'{"text": "a"}\n{"text": "\xe4"}\n'), "line 2 is not text in UTF-8"),
    ("utf16.jsonl", holding('{"text": "a"}\n'.encode("utf-16")), "is text in UTF-16; save the file as UTF-8"),
    ("deep.jsonl", holding("[" * 200_000), "line 1: not JSON: nested too deeply"),
    ("digits.jsonl", holding('{"text": ' + "9" * 5000 + "}"), "line 1: not JSON: Exceeds the limit"),
    ("list.jsonl", holding('{"text": "a"}\n["a"]\n'), "line 2: an array, not a JSON object"),
    ("number.jsonl", holding("3\n"), "line 1: a number, not a JSON object"),
    ("empty.jsonl", holding(""), "has no rows"),
    ("blank.jsonl", holding(" \n\n\t\n"), "has no rows"),
    ("folder.jsonl", Path.mkdir, "it is a folder: name one file"),
    ("pipe.jsonl", os.mkfifo, "there is no such file"),
    ("device.jsonl", lambda path: path.symlink_to("/dev/zero"), "there is no such file"),
    ("missing.jsonl", lambda path: None, "there is no such file"),
    (
        "rows.pkl",
        holding(pickle.dumps([{"text": "a"}])),
        ".jsonl, .json, .csv or .parquet",
    ),
    ("number_row.jsonl", twelve({"text": 3}), "column text: 3: not text"),
    ("nan_row.jsonl", twelve({"text": float("nan")}), "line 1: not JSON: NaN is no JSON value"),
    ("list_row.jsonl", twelve({"text": ["a"] * 1000}), "column text: ['a', "),
    ("half_text.jsonl", twelve({"text": "\ud800"}), "column text: contains lone surrogates"),
    ("half_pair.jsonl", twelve({"prompt": "\udfff", "completion": "a"}), "column prompt: contains lone surrogates"),
    ("columns.jsonl", twelve({"asked": "a", "answer": "b"}), "has the columns asked, answer; allowed: messages"),
    ("odd_column.jsonl", twelve({"\x1b[31m\n": "a"}), "has the columns '\\x1b[31m\\n'; allowed"),
    ("half_column.jsonl", twelve({"\ud800": "a"}), "has the columns '\\ud800'; allowed"),
    ("long_column.jsonl", twelve({"a" * 100_000: "a"}), "aaa…; allowed"),
    ("many_columns.jsonl", twelve({f"c{n}": "a" for n in range(9000)}), "c29, and 8970 more; allowed"),
    ("markup_column.jsonl", twelve({"[/red]": "a"}), "has the columns [/red]; allowed"),
    ("no_list.jsonl", twelve({"messages": "hello"}), "column messages: 'hello': not a list of messages"),
    ("no_message.jsonl", saying(None), "column messages: message 1: None: not a message"),
    ("no_role.jsonl", saying({"role": 3, "content": "a"}), "column messages: message 1: role 3: not text"),
    ("half_chat.jsonl", saying({"role": "assistant", "content": "\ud800"}), "column messages: contains lone"),
    ("binary.csv", holding(b"text\n\x80\x81\n"), "line 2 is not text in UTF-8"),
    ("nul.csv", holding(b"\0" * 1000), "is not text in UTF-8: its first bytes"),
    ("long_line.csv", sparse, LONG_LINE),
    ("utf16.csv", holding("text\na\n".encode("utf-16")), "is text in UTF-16; save the file as UTF-8"),
    ("columns.csv", holding("asked,answer\na,b\n"), "has the columns asked, answer; allowed"),
    ("ragged.csv", holding("text\na\nb,c,d\n"), "line 3: has 3 fields, but line 1 names 1 column"),
    ("open_quote.csv", holding('text\n"a\n'), "line 2: a quote opens a field and is never closed"),
    ("empty.csv", holding(""), "has no rows"),
    ("head.csv", holding("text\n"), "has no rows"),
    ("folder.csv", Path.mkdir, "it is a folder: name one file"),
    ("text.parquet", holding("text"), "not a whole Parquet file"),
    ("empty.parquet", holding(""), "not a whole Parquet file"),
    ("sparse.parquet", sparse, "not a whole Parquet file"),
    ("cut.parquet", spoilt_table(200, 10_000, b""), "not a whole Parquet file"),
    ("spoilt.parquet", spoilt_table(20, 60, b"\xff" * 40), "not a whole Parquet file"),
    ("foot.parquet", holding(b"PAR1\xff\xff\xff\x7fPAR1"), "not a whole Parquet file"),
    ("bytes.parquet", table(text=[b"\xff"] * 20), "column text: b'\\xff': not text"),
    ("no_text.parquet", table(text=NO_TEXT), "Column 0: In chunk 0: Invalid: Invalid UTF8 sequence"),
    ("no_date.parquet", table(text=["a"] * 20, date=YEAR_146_MILLION), "holds a value that cannot be read"),
    ("columns.parquet", table(asked=["a"]), "has the columns asked; allowed"),
]


@pytest.mark.parametrize("key", ["data.name", "data.eval_name"])
@pytest.mark.parametrize(("name", "make", "part"), DATA, ids=[name for name, _, _ in DATA])
def test_a_malformed_data_file_is_refused_with_key_and_place(
    refuses: Refuses, write: Write, tmp_path: Path, key: str, name: str, make: Make, part: str
) -> None:
    make(tmp_path / name)
    file = write(key, str(tmp_path / name))
    refuses(file, f"error: {key}: {tmp_path / name}: ", part)


def test_a_gigabyte_line_is_refused_within_a_lines_memory(refuses: Refuses, write: Write, tmp_path: Path) -> None:
    sparse(tmp_path / "rows.jsonl")
    file = write("data.name", str(tmp_path / "rows.jsonl"))
    tracemalloc.start()
    refuses(file, LONG_LINE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * MAX_LINE_BYTES


NO_PATHS = ["~nobody-has-this-name/x", "x" * 300, "../../x", "/etc/passwd", "a/../b", "[red]x[/blue]"]


@pytest.mark.parametrize("key", ["model.name", "data.name", "data.eval_name"])
@pytest.mark.parametrize("suffix", ["", ".jsonl"])
@pytest.mark.parametrize("name", NO_PATHS)
def test_a_name_that_leads_nowhere_is_refused_with_its_key(
    refuses: Refuses, write: Write, key: str, suffix: str, name: str
) -> None:
    refuses(write(key, f"{name}{suffix}"), f"error: {key}: {name}{suffix}: ")
