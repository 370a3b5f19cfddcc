"""Knows the columns that say how rows are meant: none of them is left out without the user's word."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loragrid.data.shapes.messages import LEARNING_KEYS, is_role

TEXT_ANSWERS = ("completion", "answer", "response", "output", "solution", "summary", "translation", "headline")
TEXT_QUESTIONS = ("prompt", "question", "instruction", "query", "problem")

_PREFERENCE = frozenset({"chosen", "rejected", "preferred", "dispreferred"})
_MEDIA = frozenset({"image", "audio", "video", "picture", "photo"})
_MEDIA_IN_WORDS = frozenset({"caption", "description", "prompt", "text"})
_CONTEXT = frozenset(
    {
        *("context", "ctx", "passage", "document", "doc", "paragraph", "article", "input", "history", "background"),
        *("choice", "option", "ending", "distractor", "evidence", "premise", "story", "hint", "knowledge", "schema"),
    }
)
_PART_OF_ANSWER = frozenset(
    {"thinking", "reasoning", "rationale", "cot", "thought", "explanation", "scratchpad", "think"}
)
_DESCRIBING = frozenset(
    {
        *("id", "ids", "uid", "uuid", "num", "number", "count", "length", "len", "index", "idx", "hash", "source"),
        *("type", "kind", "name", "title", "lang", "language", "date", "time", "timestamp", "token", "score", "model"),
        *("version", "license", "url", "path", "file", "mode"),
    }
)
"""Words of a name that only describes another column, such as `document_id`."""
_LABELS = ("class", "category", "intent", "sentiment", "target")
_ROLES = ("role", "speaker", "sender", "from")
_CONTINUES = ("parent", "parent_id", "reply_to", "in_reply_to", "turn", "turn_id", "turn_idx", "turn_index")
_CONVERSATIONS = ("conversation_id", "conv_id", "dialog_id", "dialogue_id", "thread_id", "message_tree_id")
_VERDICTS = ("accepted", "approved", "correct", "valid", "deleted", "keep", "exclude", "excluded", "ignore", "discard")
_VERDICT_VALUES = frozenset({"accept", "reject", "ignore", "accepted", "rejected", "approved", "good", "bad"})
_TEMPLATE_KEYS = ("chat_template_kwargs", "template_kwargs", "tool_choice")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A column that says how rows are meant. why: the predicate of a sentence about it. use: how to use it, or None."""

    column: str
    why: str
    use: str | None = None


def wish_of(
    unused: Sequence[str], used: Mapping[str, str], rows: Sequence[Mapping[str, Any]], systems: Collection[str]
) -> Wish | None:
    """The first unused column that says how rows are meant; None if there is none.

    used: canonical column -> the source's own column. rows: some rows, whose values tell what a column is. systems:
    names of columns with a system prompt.
    """
    found = (_wish(column, _words(column), used, _values(rows, column), systems) for column in unused)
    first = next((wish for wish in found if wish is not None), None)
    letters = [column for column in unused if re.fullmatch(r"(?:option_?|op|choice_?)?[abAB]", column)]
    if first is None and len(letters) > 1:
        return Wish(column=letters[0], why="belongs to the prompt", use=_into_prompt(used))
    return first


def yaml_of(mapping: Mapping[str, str]) -> str:
    """A mapping as YAML in one line, as a user writes it for `data.columns`."""
    return f"{{{', '.join(f'{name}: {_quoted(own)}' for name, own in mapping.items())}}}"


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"\w[\w -]*", name) else json.dumps(name)


def _wish(
    column: str, words: frozenset[str], used: Mapping[str, str], values: Sequence[object], systems: Collection[str]
) -> Wish | None:
    name = column.strip().lower()
    if name == "split":
        use = "the keys eval_name and test_name of `data` name files of their own"
        return Wish(column=column, why="says to which split a row belongs", use=use)
    if name in LEARNING_KEYS or name in ("sample_weight", "example_weight"):
        use = "name the column weight or train, with 0 or 1"
        return Wish(column=column, why="says what is learnt, or how much", use=use)
    if name in ("tools", "functions", *systems):
        return _model_input(column, name, used)
    if name in _TEMPLATE_KEYS:
        use = "write a template in which its values are set, and name it with data.chat_template"
        return Wish(column=column, why="is meant for the chat template", use=use)
    if name == "function_call":
        return Wish(column=column, why="is a call of the assistant", use="write it as tool_calls of a message")
    if words & _MEDIA and not words & _MEDIA_IN_WORDS:
        return Wish(column=column, why="holds what is not text, and LoraGrid trains on text")
    verdicts = {value.strip().lower() for value in values if isinstance(value, str)}
    if name.removeprefix("is_") in _VERDICTS or (verdicts and verdicts <= _VERDICT_VALUES):
        use = "leave out the rows that are not to be trained, or name it train, with true or false"
        return Wish(column=column, why="says which rows are good", use=use)
    if words & _PREFERENCE and not words & _DESCRIBING:
        return Wish(
            column=column, why="holds one of two answers to choose between, and LoraGrid learns one answer of a row"
        )
    if name in ("label", "labels") and "text" not in used:
        use = "leave out the rows that are not to be trained, or make it the completion"
        return Wish(column=column, why="may hold what is to be learnt, or say which rows are good", use=use)
    if "text" in used and (wish := _beside_text(column, name, used["text"], values)):
        return wish
    if "messages" not in used and name in _CONTINUES:
        return _one_message(column, "says that a row continues another one, which would not be in its prompt")
    if words & _DESCRIBING:
        return None
    if words & _CONTEXT:
        return Wish(column=column, why="belongs to the prompt", use=_into_prompt(used))
    if words & _PART_OF_ANSWER:
        where = f"the column {used['completion']}" if "completion" in used else "the answer"
        where = "the message that it belongs to (reasoning_content)" if "messages" in used else where
        return Wish(column=column, why="may belong to the answer", use=f"write it into {where}")
    return None


def _model_input(column: str, name: str, used: Mapping[str, str]) -> Wish:
    """Tools or a system prompt, which chats take."""
    key = "tools" if name in ("tools", "functions") else "system"
    why = "is meant for the chat template" if key == "tools" else "holds a system prompt"
    if key in used:
        why += f", as {used[key]} does"
    if "input" in used or "text" in used or used.get("messages") == "instruction":
        how = "write the rows as messages" if "text" in used else f"name it {key}"
        return Wish(column=column, why=why, use=how)
    columns = {kind: used[kind] for kind in ("prompt", "messages", "completion", "system", "tools") if kind in used}
    if "completion" in columns and "messages" in columns:  # a pair of chats
        columns = {"prompt": columns.pop("messages"), **columns}
    made = "; the rows are then chats" if "messages" not in columns else ""
    return Wish(column=column, why=why, use=f"write data.columns: {yaml_of(columns | {key: column})}{made}")


def _beside_text(column: str, name: str, text: str, values: Sequence[object]) -> Wish | None:
    """What a column means beside plain text, of which every token would be learnt."""
    if name in _ROLES or (values and all(isinstance(value, str) and is_role(value) for value in values)):
        return _one_message(column, "says who speaks, so that a row is one message of a conversation")
    if name in (*_CONTINUES, *_CONVERSATIONS):
        return _one_message(column, "says that rows are parts of a conversation")
    if name in ("label", "labels", *_LABELS, *TEXT_ANSWERS):
        use = f"write data.columns: {yaml_of({'prompt': text, 'completion': column})}"
        return Wish(column=column, why="may hold what is to be learnt, or say which rows are good", use=use)
    if name in TEXT_QUESTIONS:
        use = f"write data.columns: {yaml_of({'prompt': column, 'completion': text})}"
        return Wish(column=column, why="may be the prompt of the text", use=use)
    return None


def _one_message(column: str, why: str) -> Wish:
    use = "write one row for each conversation, with its messages in their order (messages: a list of role and content)"
    return Wish(column=column, why=why, use=use)


def _into_prompt(used: Mapping[str, str]) -> str:
    if "messages" in used and "completion" not in used:
        return "write it into a message"
    if "text" in used:
        return f"write it into the column {used['text']}"
    question, answer = used.get("prompt", used.get("messages", "prompt")), used.get("completion", "completion")
    if question == "instruction" and "input" not in used:
        output = "" if answer == "output" else f", and {answer} to output"
        return f"rename it to input{output} (alpaca), or write it into the column {question}"
    return f"write it into the column {question}"


def _values(rows: Sequence[Mapping[str, Any]], column: str) -> list[object]:
    return [row[column] for row in rows if row.get(column) not in (None, "")]


def _words(name: str) -> frozenset[str]:
    """The words of a column's name, in lower case and in the singular."""
    parts = [
        *re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name),
        *re.findall(r"[A-Za-z]+", name),
    ]  # complexCoT, Complex_CoT
    lower = [part.lower() for part in parts]
    return frozenset(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
        for word in lower
    )
