"""Recognises the shape of a source's rows, and turns its rows into canonical rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow
from loragrid.data.files.sources import RowSource, shown_columns
from loragrid.data.shapes.advice import advice_on, alpaca_advice
from loragrid.data.shapes.columns import ANSWERS, CHATS, EXCLUDING, OF_CHATS, QUESTIONS, ROW_KINDS, SYSTEMS
from loragrid.data.shapes.conversions import (
    Canonical,
    Convert,
    alpaca,
    alpaca_chat,
    as_it_is,
    chat,
    chat_pair,
    unless_excluded,
)
from loragrid.data.shapes.messages import holds_messages, is_share_gpt
from loragrid.data.shapes.wishes import wish_of, yaml_of

NUM_ROWS_LOOKED_AT = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the rows of a source become canonical rows.

    name: the shape in words, such as "alpaca". columns: canonical column, or a name of a further value that the
    conversion needs -> the source's own column. unused: the source's other columns. convert: see `conversions`.
    chosen_by: the value of `data.shape` that chooses it; empty if none does.
    """

    name: str
    columns: Mapping[str, str]
    chosen_by: str = ""
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
    shape = _named_by_values(shape, source, looked_at)
    if not data.columns:
        shape = _with_columns_beside(shape, source.columns)
    shape = _with_exclusion(shape)
    used = {*shape.columns.values(), data.group_by}
    unused = tuple(column for column in source.columns if column not in used)
    if not data.columns and data.shape is None and (wish := wish_of(unused, shape.columns, looked_at, SYSTEMS)):
        use = f"to use it, {wish.use}; " if wish.use else ""
        raise ValueError(
            f"{source.title}: its rows are read as {shape.name}, without the column {shown_columns([wish.column])}, "
            f"which {wish.why}; {use}to train without it, write data.shape: {shape.chosen_by}, or remove the column"
        )
    if source.group_by is not None:
        unused = tuple(column for column in unused if column != source.group_by)
    return replace(shape, unused=unused)


def _first_rows(source: RowSource) -> list[dict[str, Any]]:
    rows = source.read(range(min(source.num_rows, NUM_ROWS_LOOKED_AT)))
    return [row for row in rows if not isinstance(row, BadRow)]


def _mapped(source: RowSource, columns: Mapping[str, str]) -> Shape:
    """The shape that `data.columns` names."""
    beside = {name: columns[name] for name in (*OF_CHATS, *EXCLUDING) if name in columns}
    own = set(columns) - set(beside)
    kinds = [kind for kind in ROW_KINDS if own <= set(kind)]
    if not kinds or (kinds[0] == ("text",) and set(beside) & set(OF_CHATS)):
        raise ValueError(f"data.columns: {', '.join(columns)}: belong to different kinds of row; {_allowed()}")
    kind = kinds[0]
    if not own:  # only columns that are beside others, which have their canonical names
        kind = next((kind for kind in ROW_KINDS if set(kind) <= set(source.columns)), kind)
    found = {name: columns.get(name, name) for name in kind} | beside
    for canonical, column in found.items():
        if column not in source.columns:
            raise ValueError(
                f"{source.title}: has no column {shown_columns([column])} (needed for {canonical}); "
                f"its columns: {shown_columns(source.columns)}"
            )
    if kind == ("prompt", "completion") and set(beside) & set(OF_CHATS):
        found = {"messages": found.pop("prompt"), **found}
        return Shape(name="prompt and completion as a chat", columns=found, convert=alpaca_chat)
    return Shape(name=_NAMES[kind], columns=found, convert=chat if "messages" in found else as_it_is)


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
        mapped = {name: own for name, own in shapes[0].columns.items() if name in ("prompt", "completion", "messages")}
        choose = choose or f"data.columns: {yaml_of(mapped)}, which leaves out all other columns"
        raise ValueError(
            f"{source.title}: its rows can be read as {ways}; choose one, for example {choose}"
            f"{alpaca_advice(source.columns)}"
        )
    if not shapes:
        raise ValueError(
            f"{source.title}: has the columns {shown_columns(source.columns)}; {_allowed()}, or a shape of "
            f"data.shape; data.columns maps other names{advice_on(source)}"
        )
    (chosen,) = shapes
    kind = next(kind for kind, some in found.items() if chosen in some)
    return replace(chosen, chosen_by=kind)


def _named_by_values(shape: Shape, source: RowSource, rows: Sequence[Mapping[str, Any]]) -> Shape:
    """The shape with the name and the conversion that its values tell."""
    own = shape.columns
    if shape.convert is chat and any(is_share_gpt(row.get(own["messages"])) for row in rows):
        return replace(shape, name="ShareGPT")
    question, answer = own.get("prompt", own.get("messages")), own.get("completion")
    if question is None or answer is None or (shape.convert not in (as_it_is, alpaca_chat)) or "input" in own:
        return shape
    asked, answered = (_are_chats([row.get(column) for row in rows]) for column in (question, answer))
    if asked != answered:
        chats, texts = (question, answer) if asked else (answer, question)
        raise ValueError(
            f"{source.title}: its column {shown_columns([chats])} holds messages, and its column "
            f"{shown_columns([texts])} does not; write both as messages, or both as text"
        )
    if not asked:
        return shape
    columns = {"messages" if name == "prompt" else name: column for name, column in own.items()}
    return replace(shape, name="prompt and completion of messages", columns=columns, convert=chat_pair)


def _with_columns_beside(shape: Shape, columns: Sequence[str]) -> Shape:
    """The shape with the columns that are read beside its own: of chats system prompts and tools, of all exclusions."""
    own = dict(shape.columns)
    if "messages" in own:
        system = [column for column in SYSTEMS if column in columns and column not in own.values()]
        more = {"system": system[0]} if len(system) == 1 else {}
        more |= {"tools": "tools"} if "tools" in columns else {}
        own |= {name: column for name, column in more.items() if name not in own}
    own |= {name: name for name in EXCLUDING if name in columns and name not in own.values()}
    return replace(shape, columns=own)


def _with_exclusion(shape: Shape) -> Shape:
    """The shape that leaves out the rows that say so themselves, if it has columns for it."""
    excluding = tuple(name for name in EXCLUDING if name in shape.columns)
    return replace(shape, convert=unless_excluded(_without(shape.convert, excluding))) if excluding else shape


def _are_chats(values: Sequence[object]) -> bool:
    """Whether a column holds messages: most of the values that there are, so that no bad row decides it."""
    given = [value for value in values if value]
    return 2 * sum(holds_messages(value) for value in given) > len(given)


def _without(convert: Convert, names: Sequence[str]) -> Convert:
    """The conversion of rows that have further values."""
    return lambda values: convert({name: value for name, value in values.items() if name not in names})


def _pair(question: str, answer: str) -> Shape:
    return Shape(name=f"{question} and {answer}", columns={"prompt": question, "completion": answer})


_NAMES = {ROW_KINDS[0]: "messages", ROW_KINDS[1]: "prompt and completion", ROW_KINDS[2]: "text"}


def _allowed() -> str:
    return f"allowed: {', '.join('+'.join(kind) for kind in ROW_KINDS[:-1])} or {'+'.join(ROW_KINDS[-1])}"
