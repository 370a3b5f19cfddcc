"""What is noticed about rows that are used: short names for metrics, and the words that people read."""

ROW_NOTES: dict[str, str] = {
    "start_not_doubled": "begin with the tokenizer's start token in their own text; it is not added again",
    "end_not_doubled": "end with an end token in their own text; none is added, and white space behind it is left out",
    "special_tokens_read": "hold the text of special tokens elsewhere, which is read as these tokens",
    "unknown_characters": "hold characters for which the tokenizer has only its unknown token",
    "text_altered": "decode to another text than their own, because the tokenizer normalises text",
    "boundary_moved": "would be cut into other tokens if prompt and completion were tokenized as one text",
    "first_token_not_learnt": "have neither a prompt nor a start token, so that nothing predicts their first token",
    "last_turn_only": "have earlier turns that the chat template renders unlike a last one; only the last is learnt",
    "earlier_turns_apart": "have earlier turns that do not answer their prompt as rendered; only the last is learnt",
    "turns_separated": "are one answered turn of a longer conversation, which was made into one row for each turn",
    "end_left_out": "end with messages behind the last learnt turn, which are left out: no label depends on them",
    "prompt_apart": "are learnt from the prompt of generation, which the chat template changes if an answer follows",
    "turn_not_ended": "have turns that the chat template ends without an end token; the model does not learn to stop",
    "end_outside_block": "have turns whose end token is outside the template's generation block; it is learnt too",
    "empty_turns": "have empty turns of the assistant, which are not learnt",
    "keys_not_rendered": "have message keys that the chat template does not render",
    "arguments_not_rendered": "have tool calls whose arguments the chat template does not render",
    "developer_as_system": "have a developer message, which the chat template gets as a system message",
    "role_as_tool": "have results of tools in another role (such as observation), which the template gets as tool",
    "own_roles": "have messages of a role of the chat template's own, which are not learnt",
    "tools_wrapped": "have bare functions as tools, which the chat template gets as {type: function, function: ...}",
    "nulls_left_out": "have null values in tools or in arguments of tool calls, which are left out",
    "excluded_turns": "have turns of the assistant that the data exclude from the loss (weight: 0 or train: false)",
    "lines_like_rows": "have a value of several lines that all look like rows of the file: a quote may be missing",
}
"""Name -> what is noticed, as the predicate of a sentence whose subject is the rows."""
