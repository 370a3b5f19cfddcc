"""Reads JSON and refuses what other readers would change or drop in silence."""

import json
import math
from typing import Any


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, an object has one key twice, or a number is none or too large.
    """
    return _parse(_DECODER.decode, text)


def parse_first_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at index `start`, and the index after it.

    Raises:
        ValueError: as `parse_json`.
    """
    found: tuple[Any, int] = _parse(_DECODER.raw_decode, text, start)
    return found


def _parse(decode: Any, *args: Any) -> Any:
    try:
        return decode(*args)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:  # its line is one of the text, not of a file
        raise ValueError(f"{error.msg.removesuffix(' at')} at character {error.colno}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {json.dumps(twice)} more than once; keep one")
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON value; write null, or a text in quotes")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits} is too large; write it as a text in quotes")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite)
