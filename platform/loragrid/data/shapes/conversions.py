"""Turns a row of a recognised shape into a canonical row; one function for each shape."""

from collections.abc import Callable, Mapping
from typing import Any

from loragrid.data.bad_rows import BadRow
from loragrid.data.shapes.messages import TOOL_ROLES, listed, messages_of, tools_of, with_system
from loragrid.data.values import shown, text_fault
from loragrid.trials.skip_reasons import EXCLUDED

Canonical = dict[str, Any] | BadRow | str
"""A canonical row, why it is refused, or the reason why it is skipped."""
Convert = Callable[[Mapping[str, Any]], Canonical]
"""Turns the values of a row, by canonical column, into a canonical row."""

NOT_ANSWERING = ("system", "developer", "user", "tool", "function", *TOOL_ROLES)

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca (Taori et al. 2023), as in the column `text` of the data set tatsu-lab/alpaca."""


def as_it_is(values: Mapping[str, Any]) -> Canonical:
    """The values are the canonical row."""
    return dict(values)


def chat(values: Mapping[str, Any]) -> Canonical:
    """Messages under any of their names, with the texts of a column `system` and the tools of a column `tools`."""
    messages = messages_of(values.get("messages"), "messages")
    if messages is None or isinstance(messages, BadRow):
        return {"messages": None} if messages is None else messages
    return _with_system_and_tools(messages, values)


def alpaca(values: Mapping[str, Any]) -> Canonical:
    """Instruction and input in the prompt of Stanford Alpaca; without an instruction the prompt is empty."""
    instruction, more = values.get("prompt"), values.get("input")
    if fault := _text_fault(values, "prompt", "input"):
        return fault
    if not instruction:
        return {"prompt": None, "completion": values.get("completion")}
    template = ALPACA_PROMPT_WITH_INPUT if more else ALPACA_PROMPT
    # Not str.format: the texts may hold braces.
    prompt = template.replace("{instruction}", "\0", 1).replace("{input}", str(more), 1).replace("\0", instruction, 1)
    return {"prompt": prompt, "completion": values.get("completion")}


def alpaca_chat(values: Mapping[str, Any]) -> Canonical:
    """Instruction and input, joined with a newline, as a message of the user; earlier turns from a column `history`."""
    if fault := _text_fault(values, "messages", "input", "completion"):
        return fault
    earlier = _history(values.get("history"))
    if isinstance(earlier, BadRow):
        return earlier
    if not values.get("messages"):
        return {"messages": None}
    question = "\n".join(text for text in (values["messages"], values.get("input")) if text)
    answer = {"role": "assistant", "content": values.get("completion") or ""}
    return _with_system_and_tools([*earlier, {"role": "user", "content": question}, answer], values)


def chat_pair(values: Mapping[str, Any]) -> Canonical:
    """A prompt and a completion that are messages themselves; only the completion's messages are learnt."""
    prompt, completion = (messages_of(values.get(name), name) for name in ("messages", "completion"))
    for part in (prompt, completion):
        if isinstance(part, BadRow):
            return part
    if not prompt or not completion or isinstance(prompt, BadRow) or isinstance(completion, BadRow):
        return {"messages": None}
    # A template can have further roles of the assistant.
    given = [message if message["role"] in NOT_ANSWERING else {**message, "weight": 0} for message in prompt]
    return _with_system_and_tools([*given, *completion], values)


def is_excluded(values: Mapping[str, Any]) -> bool | BadRow:
    """Whether the columns `weight` and `train` of a row say that it is not trained."""
    for name, plural in (("weight", "weights"), ("train", "values")):
        value = values.get(name)
        word = value.strip().lower() if isinstance(value, str) else value
        if word in (0, "0", "0.0", "false"):
            return True
        if word not in (None, "", 1, "1", "1.0", "true"):
            what = f"{shown(value)}: allowed {plural} of rows: 0 (not trained) and 1; rename or remove the column"
            return BadRow(what=what, column=name)
    return False


def unless_excluded(convert: Convert) -> Convert:
    """The conversion of the rows that are trained; the others are skipped with their reason."""

    def converted(values: Mapping[str, Any]) -> Canonical:
        excluded = is_excluded(values)
        if isinstance(excluded, BadRow):
            return excluded
        return EXCLUDED if excluded else convert(values)

    return converted


def _with_system_and_tools(messages: list[dict[str, Any]], values: Mapping[str, Any]) -> Canonical:
    whole = with_system(messages, values.get("system"), "system")
    tools = tools_of(values.get("tools"), "tools")
    for part in (whole, tools):
        if isinstance(part, BadRow):
            return part
    canonical: dict[str, Any] = {"messages": whole} if tools is None else {"messages": whole, "tools": tools}
    # Faults name messages by their numbers.
    return canonical if whole == messages else {**canonical, "system_first": True}


def _history(value: object) -> list[dict[str, Any]] | BadRow:
    turns = listed(value)
    if turns is None:
        return []
    pairs = turns if isinstance(turns, list) else [turns]
    messages = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            return BadRow(what=f"{shown(pair)}: not a pair of question and answer, both text", column="history")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _text_fault(values: Mapping[str, Any], *names: str) -> BadRow | None:
    for name in names:
        if fault := text_fault(values.get(name)):
            return BadRow(what=fault, column=name)
    return None
