"""Takes the answer out of a text, and says whether two answers are the same."""

import re
from decimal import Decimal

from loragrid.config.task import TaskConfig

NUMBER = re.compile(r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def answer_of(text: str, task: TaskConfig) -> str | None:
    """The answer in `text` in the form in which answers are compared; None where there is none."""
    found = _find(text, task)
    return None if found is None else _normalised(found, task)


def _find(text: str, task: TaskConfig) -> str | None:
    if task.answer_after is not None:
        places = text.split(task.answer_after)[1:]
        if not places:
            return None
        place = places[-1 if task.answer_at == "last" else 0]
        return (place.strip().splitlines() or [""])[0]
    if task.answer_pattern is not None:
        matches = [match for match in re.finditer(task.answer_pattern, text) if match.group(1) is not None]
        return matches[-1 if task.answer_at == "last" else 0].group(1) if matches else None
    return text


def _normalised(answer: str, task: TaskConfig) -> str | None:
    """The first number by its value (1,250.50 is 1250.5), or the words with single blanks; None without any."""
    if task.normalise == "text":
        return " ".join(answer.split()) or None
    number = NUMBER.search(answer.replace("$", ""))
    return None if number is None else f"{Decimal(number.group().replace(',', '')).normalize() + 0:f}"
