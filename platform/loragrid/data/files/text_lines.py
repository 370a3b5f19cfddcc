"""Reads the lines of a text file with their numbers, and refuses encodings in which lines cannot be told apart."""

import codecs
import itertools
from collections.abc import Iterator
from pathlib import Path

MAX_LINE_BYTES = 32 * 2**20
"""Longest line of a text format. It holds millions of tokens; a longer line could fill the memory."""

SAVE_AS_UTF_8 = "save the file as UTF-8"
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""First bytes -> encoding; UTF-32 comes first because its mark begins with that of UTF-16."""


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines with their ends, numbered from 1; a byte order mark of UTF-8 is left out.

    Only a newline (with or without a carriage return) ends a line: U+2028 and the like are ordinary characters.

    Raises:
        ValueError: the file is not text in UTF-8, holds a NUL, has a line beyond `MAX_LINE_BYTES`, or lines that end
            with a carriage return alone.
    """
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB; allowed: one row a line, each of at "
                    "most that size (longer text in several rows)"
                )
            if number == 1:
                _check_encoding(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not text in UTF-8: {error}; {SAVE_AS_UTF_8}") from error
            if "\0" in text:
                raise ValueError(f"line {number} holds a NUL character, which no text has; {SAVE_AS_UTF_8}")
            yield number, text


def ends_with_carriage_returns(line: str) -> bool:
    """Whether the line is several lines that end with a carriage return alone, as on old Macintosh computers."""
    return "\r" in line.rstrip("\r\n")


CARRIAGE_RETURNS = "its lines end with carriage returns alone; save the file with line ends LF or CRLF"


def _check_encoding(start: bytes) -> None:
    for mark, encoding in _OTHER_ENCODINGS.items():
        if start.startswith(mark):
            raise ValueError(f"is text in {encoding}; {SAVE_AS_UTF_8}")
    if b"\0" in start[:4]:
        raise ValueError(f"is not text in UTF-8: its first bytes are {start[:4]!r} (UTF-16?); {SAVE_AS_UTF_8}")
