"""A CSV file gives the fields that it holds, or is refused with the line that could be read in two ways."""

import csv
from pathlib import Path

import pandas
import pytest

from loragrid.data.bad_rows import BadRow
from loragrid.data.files.csv_rows import read_csv
from loragrid.data.files.file_rows import FileRows

HEADER = "prompt,completion\n"


def read(tmp_path: Path, content: str | bytes) -> FileRows:
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_csv(path)


def pairs(rows: FileRows) -> list[tuple[str, str]]:
    found = []
    for row in rows.read(range(rows.num_rows)):
        assert isinstance(row, dict)
        found.append((row["prompt"], row["completion"]))
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + 'a,"He said \\"hi\\""\n', r"^line 2: text follows a closing quote; .* not with a backslash"),
        (HEADER + "a,b\n" + 'a,He said \\"hi\\"\n', r"^line 3: a quote is written with a backslash"),
        (HEADER + 'a,"b"c\n', r"^line 2: text follows a closing quote"),
        (HEADER + 'a,"b\nc,d\ne,"f"\n', r"^lines 2 to 4: text follows a closing quote"),
        (HEADER + "a,b\n" + 'a,"b\nc,d\ne,f\n', r"^lines 3 to 5: a quote opens a field and is never closed"),
        (HEADER + 'a, "b, c"\n', r"^line 2: a blank is before the quote that opens a field"),
        (HEADER + 'a,\t"b"\n', r"^line 2: a blank is before the quote"),
        ("prompt,prompt\na,b\n", r"^line 1: several columns have the name 'prompt'"),
        ("prompt,completion,\na,b,\n", r"^line 1: column 3 has no name, and every line ends with a comma"),
        ("prompt,,completion\na,b,c\n", r"^line 1: column 2 has no name; "),
        ("prompt, completion\na, b\n", r"^line 1: the column name ' completion' begins or ends with a blank"),
        ("prompt;completion\na;b\n", r"^line 1: its fields are separated by semicolons"),
        ('"prompt";"completion"\n"a";"b"\n', r"^line 1: its fields are separated by semicolons"),
        ("prompt\tcompletion\na\tb\n", r"^line 1: its fields are separated by tabs"),
        ("prompt|completion\na|b\n", r"^line 1: its fields are separated by vertical bars"),
        ("sep=;\nprompt;completion\na;b\n", r"^line 1 is 'sep=;', a note for Excel"),
        ("# exported\n" + HEADER + "a,b\n", r"^line 1 begins with '#'"),
        ((HEADER + "a,b\n").encode("utf-16"), r"^is text in UTF-16; save the file as UTF-8"),
        ((HEADER + "a,b\n").encode("utf-16-le"), r"^is not text in UTF-8: .*\(UTF-16\?\)"),
        ((HEADER + "a,b\n").encode("utf-32"), r"^is text in UTF-32"),
        ((HEADER + "café,b\n").encode("cp1252"), r"^line 2 is not text in UTF-8"),
        (HEADER + "a,b\0c\n", r"^line 2 holds a NUL character"),
        ("prompt,completion\ra,b\rc,d\r", r"^line 1: its lines end with carriage returns alone"),
        (HEADER + "a,b\rc,d\n", r"^line 2: its lines end with carriage returns alone"),
    ],
)
def test_a_file_that_can_be_read_in_two_ways_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (
            HEADER + "a,b,c\nd,e\n",
            2,
            "has 3 fields, but line 1 names 2 columns; a field with a comma must be in quotes",
        ),
        (HEADER + "d,e,f\n" * 3, 2, "has 3 fields"),
        (HEADER + "d,e\n\n" + "a,b,c\n", 4, "has 3 fields"),
        (HEADER + '"d\n\nd",e\n' + "a\n", 5, "has 1 field, but line 1 names 2 columns"),
        (HEADER + "a,b,\n", 2, "it ends with a comma"),
        (HEADER + "# a comment\n", 2, "has 1 field"),
        (HEADER + "a,b\n\ufeff" + HEADER + "c,d\n", 3, "repeats line 1"),
        ("text\nSo, this is it\n", 2, "has 2 fields, but line 1 names 1 column"),
    ],
)
def test_a_line_that_is_no_row_of_the_header_is_bad(tmp_path: Path, content: str, line: int, what: str) -> None:
    rows = read(tmp_path, content)
    number, bad = next(iter(rows.broken.items()))
    assert rows.place(number) == f"line {line}"
    assert what in bad.what
    assert isinstance(rows.read([number])[0], BadRow)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_fields_are_what_the_writer_wrote(tmp_path: Path, mark: str, end: str) -> None:
    written = [
        ("007", "NA"),
        ('say "hi"', "a, b"),
        ("two\nlines", "\n\nmore, of\nit"),
        (" blanks ", ""),
        ("", "null"),
        ('"', '""'),
        ("#no comment", "5' 11\""),
        ("x" * 200_000, "line\u2028separator"),
    ]
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        writer = csv.writer(file, lineterminator=end)
        writer.writerow(("prompt", "completion"))
        writer.writerows(written)
    assert pairs(read_csv(path)) == written
    assert pairs(read_csv(path))[2][1].count("\n") == 3


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    rows = read(tmp_path, HEADER + '\n"two\nlines",b\n   \nc,d\n\n\ne,f')
    assert [rows.place(number) for number in range(3)] == ["line 3", "line 6", "line 9"]
    assert pairs(rows)[1:] == [("c", "d"), ("e", "f")]


def test_a_table_of_pandas_with_its_index_is_read(tmp_path: Path) -> None:
    pandas.DataFrame({"prompt": ["a"], "completion": ["b"]}).to_csv(tmp_path / "rows.csv")
    rows = read_csv(tmp_path / "rows.csv")
    assert rows.columns == ("(column 1, without a name)", "prompt", "completion")
    assert pairs(rows) == [("a", "b")]


def test_a_quote_inside_an_unquoted_field_is_a_character(tmp_path: Path) -> None:
    assert pairs(read(tmp_path, HEADER + 'Who said "no"?,5" pipe\n')) == [('Who said "no"?', '5" pipe')]


def test_lines_inside_quotes_that_look_like_rows_are_noticed(tmp_path: Path) -> None:
    swallowed = read(tmp_path, HEADER + 'a,b\na,"b\nc,d\ne,f"\ng,h\n')
    assert swallowed.notes == {1: "lines_like_rows"}
    assert read(tmp_path, HEADER + 'a,"b\nprose without the sign\nf"\n').notes == {}


def test_the_limit_of_the_csv_module_is_as_before(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    read(tmp_path, HEADER + "a,b\n")
    with pytest.raises(ValueError, match="line 2"):
        read(tmp_path, HEADER + 'a,"b\n')
    assert csv.field_size_limit() == before
