"""What is noticed about rows that are used: short names for metrics, and the words that people read."""

ROW_NOTES: dict[str, str] = {
    "start_not_doubled": "begin with the tokenizer's start token in their own text; it is not added again",
    "end_not_doubled": "end with the end token in their own text; it is not added again",
    "boundary_moved": "would be cut into other tokens if prompt and completion were tokenized as one text",
    "last_turn_only": "have earlier turns that the chat template renders differently later; only the last is learnt",
    "turns_separated": "are one answered turn of a longer conversation, which was made into one row for each turn",
    "excluded_turns": "have turns of the assistant that the data exclude from the loss (weight: 0 or train: false)",
    "lines_like_rows": "have a value of three or more lines that all look like rows of the CSV file: a quote may be missing",
}
"""Name -> what is noticed, as the predicate of a sentence whose subject is the rows."""
