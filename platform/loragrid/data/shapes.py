"""Recognises the shape of a source's rows, and turns its rows into canonical rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow
from loragrid.data.column_wishes import wish_of
from loragrid.data.conversions import (
    Canonical,
    Convert,
    alpaca,
    alpaca_chat,
    as_it_is,
    chat,
    chat_pair,
    unless_excluded,
)
from loragrid.data.messages import holds_messages, is_share_gpt
from loragrid.data.sources import RowSource, shown_columns

ROW_KINDS = (("messages",), ("prompt", "completion"), ("text",))
"""The canonical columns of each kind of row; a data set is read as exactly one kind."""
OF_CHATS = ("system", "tools")
"""Canonical columns that a chat may have beside its messages."""
CHATS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question", "instruction", "query", "problem", "input")
ANSWERS = ("completion", "answer", "response", "output", "solution")
SYSTEMS = ("system", "system_prompt")
NUM_ROWS_LOOKED_AT = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the rows of a source become canonical rows.

    name: the shape in words, such as "alpaca". columns: canonical column, or a name of a further value that the
    conversion needs -> the source's own column. unused: the source's other columns. convert: see `conversions`.
    """

    name: str
    columns: Mapping[str, str]
    unused: tuple[str, ...] = ()
    convert: Convert = as_it_is

    def canonical(self, row: Mapping[str, Any]) -> Canonical:
        """The row with the canonical columns only, why it is refused, or the reason why it is skipped."""
        return self.convert({canonical: row.get(column) for canonical, column in self.columns.items()})

    def own_name(self, column: str) -> str:
        """The source's own name of a canonical column."""
        return self.columns.get(column, column)

    @property
    def described(self) -> str:
        """The shape with its columns and those that are not used, for people."""
        used = shown_columns(list(dict.fromkeys(self.columns.values())))
        return f"{self.name} ({used})" + (f"; not used: {shown_columns(self.unused)}" if self.unused else "")


def recognise(source: RowSource, data: DataConfig) -> Shape:
    """The shape of a source's rows: what `data.columns` or `data.shape` say, or the only known one that fits.

    Raises:
        ValueError: the rows have no known shape, or several, or a column says how rows are meant and is not used.
    """
    looked_at = _first_rows(source)
    if data.columns:
        shape = _mapped(source, data.columns)
    else:
        shape = _chosen(source, _candidates(source.columns, looked_at), data.shape)
    shape = _completed(shape, source.columns, looked_at)
    used = {*shape.columns.values(), data.group_by}
    unused = tuple(column for column in source.columns if column not in used)
    if not data.columns and data.shape is None and (wish := wish_of(unused, shape.columns)):
        column, why = wish
        examples = [{name: shape.columns[name] for name in kind if name in shape.columns} for kind in ROW_KINDS]
        if "text" in shape.columns:
            examples = [{"text": "text"}, {"prompt": "text", "completion": column}]
        ways = " or ".join(_yaml(example) for example in examples if example)
        raise ValueError(
            f"{source.title}: its rows are read as {shape.name}, without the column {shown_columns([column])}, which "
            f"{why}; name the columns to use, for example data.columns: {ways}, or remove the column"
        )
    if source.group_by is not None:
        unused = tuple(column for column in unused if column != source.group_by)
    return replace(shape, unused=unused)


def _first_rows(source: RowSource) -> list[dict[str, Any]]:
    rows = source.read(range(min(source.num_rows, NUM_ROWS_LOOKED_AT)))
    return [row for row in rows if not isinstance(row, BadRow)]


def _mapped(source: RowSource, columns: Mapping[str, str]) -> Shape:
    """The shape that `data.columns` names."""
    kinds = [kind for kind in ROW_KINDS if set(columns) <= {*kind, *(OF_CHATS if kind == ROW_KINDS[0] else ())}]
    if not kinds:
        raise ValueError(f"data.columns: {', '.join(columns)}: belong to different kinds of row; {_allowed()}")
    found = {canonical: canonical for canonical in kinds[0]} | dict(columns)
    for canonical, column in found.items():
        if column not in source.columns:
            raise ValueError(
                f"{source.title}: has no column {shown_columns([column])} (needed for {canonical}); "
                f"its columns: {shown_columns(source.columns)}"
            )
    return Shape(name=_NAMES[kinds[0]], columns=found, convert=chat if "messages" in found else as_it_is)


def _candidates(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Shape]]:
    """Value of `data.shape` -> the shapes of that name that the columns have."""
    chats = [
        Shape(name="messages", columns={"messages": column}, convert=chat)
        for column in CHATS
        if column in columns and (column != "conversation" or any(holds_messages(row.get(column)) for row in rows))
    ]
    found: dict[str, list[Shape]] = {"messages": chats}
    if {"instruction", "output"} <= set(columns):
        more = {"input": "input"} if "input" in columns else {}
        answer = {"completion": "output"}
        found["alpaca"] = [Shape(name="alpaca", columns={"prompt": "instruction", **more, **answer}, convert=alpaca)]
        history = {"history": "history"} if "history" in columns else {}
        own = {"messages": "instruction", **more, **history, **answer}
        found["alpaca_chat"] = [Shape(name="alpaca_chat", columns=own, convert=alpaca_chat)]
    elif {"prompt", "completion"} <= set(columns):
        found["prompt_completion"] = [_pair("prompt", "completion")]
    else:
        asked, answered = ([name for name in names if name in columns] for names in (QUESTIONS, ANSWERS))
        found["prompt_completion"] = [_pair(question, answer) for question in asked for answer in answered]
    found["text"] = [Shape(name="text", columns={"text": "text"})] if "text" in columns else []
    return found


def _chosen(source: RowSource, found: Mapping[str, Sequence[Shape]], name: str | None) -> Shape:
    if name is not None:
        shapes = list(found.get(name, ()))
        if not shapes:
            raise ValueError(
                f"data.shape: {name}: {source.title} has no such rows; its columns: {shown_columns(source.columns)}"
            )
    else:
        # A published prompt has no place for a system prompt or earlier turns.
        in_chat = any(column in source.columns for column in (*SYSTEMS, "history", "tools"))
        other = "alpaca" if in_chat else "alpaca_chat"
        shapes = [shape for kind, some in found.items() if kind != other for shape in some]
    if len(shapes) > 1:
        ways = " or ".join(f"{shape.name} ({', '.join(shape.columns.values())})" for shape in shapes)
        kinds = sorted({kind for kind, some in found.items() for shape in some if shape in shapes})
        choose = f"data.shape: {kinds[0]}" if len(kinds) == len(shapes) else ""
        mapped = _yaml({name: own for name, own in shapes[0].columns.items() if name in ("prompt", "completion")})
        choose = choose or f"data.columns: {mapped if shapes[0].name != 'messages' else _yaml(shapes[0].columns)}"
        raise ValueError(f"{source.title}: its rows can be read as {ways}; choose one, for example {choose}")
    if not shapes:
        raise ValueError(
            f"{source.title}: has the columns {shown_columns(source.columns)}; {_allowed()}, or a shape of "
            f"data.shape; data.columns maps other names{_suggested(source)}"
        )
    return shapes[0]


def _completed(shape: Shape, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Shape:
    """The shape with the columns that are read beside its own, and with the name that its values tell."""
    pair = {"prompt", "completion"} <= set(shape.columns) and shape.convert is as_it_is
    if pair and _are_chats([row.get(shape.columns[name]) for row in rows for name in ("prompt", "completion")]):
        own = {"messages": shape.columns["prompt"], "completion": shape.columns["completion"]}
        shape = Shape(name="prompt and completion of messages", columns=own, convert=chat_pair)
    own = dict(shape.columns)
    if "messages" in own:
        if shape.convert is chat and any(is_share_gpt(row.get(own["messages"])) for row in rows):
            shape = replace(shape, name="ShareGPT")
        system = [column for column in SYSTEMS if column in columns and column not in own.values()]
        more = {"system": system[0]} if len(system) == 1 else {}
        more |= {"tools": "tools"} if "tools" in columns else {}
        own |= {name: column for name, column in more.items() if name not in own}
    convert = shape.convert
    excluding = {name: name for name in ("weight", "train") if name in columns and name not in own.values()}
    if excluding:
        convert = unless_excluded(_without(convert, tuple(excluding)))
    return replace(shape, columns={**own, **excluding}, convert=convert)


def _are_chats(values: Sequence[object]) -> bool:
    """Whether prompts and completions are messages: most of those that have a value, so that no bad row decides it."""
    given = [value for value in values if value]
    return 2 * sum(holds_messages(value) for value in given) > len(given)


def _without(convert: Convert, names: Sequence[str]) -> Convert:
    """The conversion of rows that have further values."""
    return lambda values: convert({name: value for name, value in values.items() if name not in names})


def _pair(question: str, answer: str) -> Shape:
    return Shape(name=f"{question} and {answer}", columns={"prompt": question, "completion": answer})


def _suggested(source: RowSource) -> str:
    """What may be meant, as the rest of a sentence: names in other letters, or a file without its first line."""
    lower = {column.strip().lower(): column for column in source.columns}
    preferred = [lower[name] for name in ("chosen", "preferred_output") if name in lower]
    if preferred:
        kind = {"prompt": lower["prompt"], "completion": preferred[0]} if "prompt" in lower else None
        way = _yaml(kind or {"messages": preferred[0]})
        return f" (a pair of answers to choose between is not learnt; the better one is with data.columns: {way})"
    names = [{"messages": lower[name]} for name in CHATS if name in lower]
    asked, answered = ([lower[name] for name in known if name in lower] for known in (QUESTIONS, ANSWERS))
    names += [{"prompt": asked[0], "completion": answered[0]}] if asked and answered else []
    names += [{"text": lower["text"]}] if "text" in lower else []
    if names:
        return f" (capital letters count), for example {_yaml(names[0])}"
    if source.name.lower().endswith(".csv"):
        return "; if these are values of a row, the file lacks its first line with the names of the columns"
    return ""


def _yaml(mapping: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{name}: {shown_columns([own])}' for name, own in mapping.items())}}}"


_NAMES = {ROW_KINDS[0]: "messages", ROW_KINDS[1]: "prompt and completion", ROW_KINDS[2]: "text"}


def _allowed() -> str:
    return f"allowed: {', '.join('+'.join(kind) for kind in ROW_KINDS[:-1])} or {'+'.join(ROW_KINDS[-1])}"
