"""Refuses answers whose tags, such as <think>, the chat template takes for what they may not be.

Templates of reasoning models look for tags in an answer's text, take it apart there and write it anew. That is right
for one block of reasoning at the answer's beginning, and wrong for an answer that only mentions a tag.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from loragrid.data.chats.markers import Piece
from loragrid.data.chats.template import ChatRefusedError

REMEDY = "write the reasoning as reasoning_content of the message, or remove the tags"


def check_tags(content: Any, text: str, start: int, tags: "re.Pattern[str]", turn: str) -> None:
    """Refuse an answer with tags that the template moves, or to which it adds a tag.

    Allowed is a content that the template writes as it is, and one with a block of reasoning at its beginning around
    whose tags the template changes white space only. In both cases the template must write no tag directly before it
    that belongs to the same kind of block.

    content: of the message. text: the rendered chat up to the turn. start: where the answer
    begins. tags: finds the template's tags. turn: the turn, in words.

    Raises:
        ChatRefusedError: the content is rendered in another way.
    """
    parts = [part["text"] for part in content] if isinstance(content, list) else [content]
    for part in parts:
        if isinstance(part, str) and tags.search(part):
            _check(part.strip(), text, start, tags, turn)


def _check(content: str, text: str, start: int, tags: "re.Pattern[str]", turn: str) -> None:
    names = tags.findall(content)
    blocks = len(names) == 2 and content.startswith(names[0]) and names[1] == _closing(names[0])
    place = max((text.rfind(form) for form in Piece("", content, "").forms()), default=-1)
    if place < 0:
        found = [match for pattern in _spaced(content, tags) for match in pattern.finditer(text)]
        if not found or not blocks:
            raise ChatRefusedError(
                f"the chat template reads the tag {names[0]} in the content of {turn} and renders the content "
                f"otherwise; {REMEDY}"
            )
        place = found[-1].start()
    before = text[:place].rstrip()
    added = next((tag for tag in tags.findall(text[start:place])[-1:] if before.endswith(tag)), None)
    if added and any(_closing(added) == name for name in names[:1]):
        raise ChatRefusedError(f"the chat template adds {added} before the content of {turn}, which lacks it; {REMEDY}")
    if content.startswith(names[0]) and (closing := _closing(names[0])) and before.endswith(closing):
        raise ChatRefusedError(
            f"the chat template writes a block that ends with {closing} before the content of {turn}, which begins "
            f"with such a block; {REMEDY}"
        )


def _closing(tag: str) -> str | None:
    """The tag that closes a tag; None if it opens no block."""
    if tag.startswith(("</", "[/", "◁/", "<|/")):
        return None
    if tag.startswith("<|"):
        return "<|/" + tag[2:]
    return f"{tag[0]}/{tag[1:]}"


def _spaced(content: str, tags: "re.Pattern[str]") -> Iterator["re.Pattern[str]"]:
    """Finds the content with other white space around its tags."""
    for form in Piece("", content, "").forms():
        ends = [0, *(end for tag in tags.finditer(form) for end in tag.span()), len(form)]
        words = [form[begin:end].strip() for begin, end in pairwise(ends)]
        yield re.compile(r"\s*".join(re.escape(word) for word in words if word))
