"""Checks the values of rows."""

from loragrid.schema.errors import is_unicode

HALF_CHARACTERS = "contains lone surrogates (such as \\ud800), which no tokenizer accepts"


def text_fault(value: object) -> str | None:
    """Why a value is no text, as the end of a sentence; None if it is text or absent."""
    if value is None:
        return None
    if not isinstance(value, str):
        return f"{shown(value)}: not text"
    return None if is_unicode(value) else HALF_CHARACTERS


def shown(value: object) -> str:
    """The value for an error message, on one line and shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
