"""The repository's documents and their code blocks, for the tests that check them."""

import copy
import re
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"^(?P<indent>[ ]*)```(?P<language>\w+)\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL
)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")

MINIMAL: Mapping[str, Any] = {
    "name": "minimal",
    "model": {"name": "smollm2-135m-instruct"},
    "data": {"name": "chitchat"},
    "training": {"steps": 100},
    "methods": ["lora"],
}
"""The keys that complete a document's fragment to a valid experiment."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of code. place: file and line, as a test's id."""

    place: str
    language: str
    text: str


def documents() -> list[Path]:
    """Every hand-written Markdown file for readers."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    return sorted(found)


def blocks_in(text: str, name: str) -> list[Block]:
    """The blocks of a document, including those inside lists."""
    return [
        Block(
            place=f"{name}:{text.count(chr(10), 0, match.start()) + 1}",
            language=match["language"],
            text=textwrap.dedent(match["text"]),
        )
        for match in BLOCK.finditer(text)
    ]


def blocks(language: str) -> list[Block]:
    """The blocks of one language in all documents."""
    found = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        found += [block for block in blocks_in(text, path.relative_to(ROOT).as_posix()) if block.language == language]
    return found


def spans() -> list[tuple[str, str]]:
    """(file, text) of every code span outside the blocks of code, in all documents."""
    found = []
    for path in documents():
        text = BLOCK.sub("", path.read_text(encoding="utf-8"))
        found += [(path.relative_to(ROOT).as_posix(), span) for span in SPAN.findall(text)]
    return found


def command_lines(text: str) -> list[list[str]]:
    """The words of every command in a shell block: continued lines joined, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def with_minimal(fragment: Mapping[str, Any]) -> dict[str, Any]:
    """`MINIMAL` with the fragment's keys: a whole experiment."""
    whole: dict[str, Any] = copy.deepcopy(dict(MINIMAL))
    for key, value in fragment.items():
        is_section = isinstance(value, Mapping) and isinstance(whole.get(key), Mapping)
        whole[key] = {**whole[key], **value} if is_section else value
    own = fragment.get("training", {})
    if "epochs" in own and "steps" not in own:  # the minimal length would be a second one
        del whole["training"]["steps"]
    return whole
