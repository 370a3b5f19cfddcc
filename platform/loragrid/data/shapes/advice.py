"""Says what a user can do with rows that have no known shape, as the rest of a sentence."""

from collections.abc import Mapping, Sequence

from loragrid.data.bad_rows import BadRow
from loragrid.data.files.json_rows import remedy_for_nested
from loragrid.data.files.sources import RowSource, shown_columns
from loragrid.data.shapes.columns import ANSWERS, CHATS, QUESTIONS
from loragrid.data.shapes.wishes import yaml_of


def advice_on(source: RowSource) -> str:
    """What may be meant: names in other letters, rows inside a row, or a file without its first line."""
    lower = {column.strip().lower(): column for column in source.columns}
    if "role" in lower and ("content" in lower or "message" in lower):
        return (
            "; a row seems to be one message: write one row for each conversation, with its messages in their order "
            "(messages: a list of role and content)"
        )
    preferred = [lower[name] for name in ("chosen", "preferred_output") if name in lower]
    if preferred:
        kind = {"prompt": lower["prompt"], "completion": preferred[0]} if "prompt" in lower else None
        way = yaml_of(kind or {"messages": preferred[0]})
        return f" (a pair of answers to choose between is not learnt; the better one is with data.columns: {way})"
    names: list[Mapping[str, str]] = [{"messages": lower[name]} for name in CHATS if name in lower]
    asked, answered = ([lower[name] for name in known if name in lower] for known in (QUESTIONS, ANSWERS))
    names += [{"prompt": asked[0], "completion": answered[0]}] if asked and answered else []
    names += [{"text": lower["text"]}] if "text" in lower else []
    if names:
        others = [column for column in source.columns if column not in names[0].values()]
        without = f", which leaves out {shown_columns(others)}" if others else ""
        return f" (capital letters count), for example {yaml_of(names[0])}{without}"
    (first,) = source.read([0])
    if source.num_rows == 1 and not isinstance(first, BadRow) and (remedy := remedy_for_nested(first)):
        return remedy
    if source.name.lower().endswith(".csv"):
        return "; if these are values of a row, the file lacks its first line with the names of the columns"
    return ""


def alpaca_advice(columns: Sequence[str]) -> str:
    """How rows with an instruction and an input are read whole, if only the name of their answer is unusual."""
    answers = [name for name in ANSWERS if name in columns]
    if {"instruction", "input"} <= set(columns) and len(answers) == 1 and answers[0] != "output":
        return f"; to use instruction and input together, rename the column {answers[0]} to output (alpaca)"
    return ""
