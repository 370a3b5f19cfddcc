"""Knows the columns that say how rows are meant: none of them is left out without the user's word."""

from collections.abc import Collection, Mapping, Sequence

_PREFERENCES = "holds one of two answers to choose between, and LoraGrid learns one answer"
_MEDIA = "holds what is not text, and LoraGrid trains on text"
_LABEL = "may hold what is to be learnt, or say which rows are good"
_CONTEXT = "belongs to the prompt"
_MODEL_INPUT = "is meant for the chat template (data.columns maps tools and system of rows with messages)"
_OF_CHATS = "is read of rows with messages only (write the rows as messages to use it)"

WISHES: Mapping[str, str] = {
    **dict.fromkeys(("chosen", "rejected", "preferred_output", "non_preferred_output"), _PREFERENCES),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("label", "labels", "class", "category", "intent", "sentiment", "target"), _LABEL),
    **dict.fromkeys(("context", "passage", "input", "history"), _CONTEXT),
    **dict.fromkeys(("functions", "function_call", "documents", "chat_template_kwargs"), _MODEL_INPUT),
    **dict.fromkeys(("tools", "system", "system_prompt"), _OF_CHATS),
    **dict.fromkeys(("thinking", "reasoning", "reasoning_content"), "may belong to the answer"),
    "split": "says to which split a row belongs; the keys eval_name and test_name of `data` name files of their own",
    "loss_mask": "says what is learnt",
}
"""Column, in lower case -> why rows are not what their user meant without it."""


def wish_of(unused: Sequence[str], used: Collection[str]) -> tuple[str, str] | None:
    """The first unused column that says how rows are meant, and why; None if there is none.

    A label is one only beside text that could be its prompt: chats and pairs have their answer.
    """
    for column in unused:
        name = column.lower()
        if name in WISHES and (WISHES[name] != _LABEL or name in ("label", "labels") or "text" in used):
            return column, WISHES[name]
    return None
