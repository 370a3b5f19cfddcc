"""Why rows of a data set are read and not used: short names for metrics, and the words that people read."""

UNUSABLE: dict[str, str] = {
    "too_long": "longer than max_length",
    "without_labels": "without a token to learn",
    "rewritten": "earlier turns rewritten by the chat template",
    "empty_prompt": "empty prompt",
    "empty_completion": "empty completion",
    "empty_messages": "empty messages",
    "empty_turns": "chats whose turns of the assistant are empty",
    "empty_text": "empty text",
    "broken_line": "not a row of the file's format",
    "bad_row": "refused for what they hold",
    "excluded": "excluded by the data (weight: 0 or train: false)",
}
"""Name -> reason for which a row cannot be trained or scored. The other rows may differ from these rows in kind."""

KEPT_APART: dict[str, str] = {
    "same_as_eval": "same as an eval row",
    "same_as_test": "same as a test row",
    "in_eval_group": "in the group of an eval row",
    "in_test_group": "in the group of a test row",
    "surplus_turns": "further turns of a chat of which the split needed only some",
}
"""Name -> reason for which a usable row belongs to no split: an earlier split has the row or its group."""

TOO_LONG = UNUSABLE["too_long"]
EMPTY_TURNS = UNUSABLE["empty_turns"]
WITHOUT_LABELS = UNUSABLE["without_labels"]
REWRITTEN = UNUSABLE["rewritten"]
BROKEN_LINE = UNUSABLE["broken_line"]
BAD_ROW = UNUSABLE["bad_row"]
EXCLUDED = UNUSABLE["excluded"]
SURPLUS_TURNS = KEPT_APART["surplus_turns"]


def empty(column: str) -> str:
    """The reason of a row whose canonical column `column` is empty."""
    return UNUSABLE[f"empty_{column}"]
