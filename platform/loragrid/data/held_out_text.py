"""Held-out plain text as rows of tokens, whose loss before and after training measures forgetting."""

from typing import TYPE_CHECKING

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow, BadRowError
from loragrid.data.files.sources import RowSource, open_held_out_text
from loragrid.data.text_frame import TextFrame
from loragrid.data.values import text_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def held_out_pieces(data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, ...]]:
    """The first `num_forgetting` pieces (null: all) of at most `max_length` tokens; empty without a text.

    Every text is cut without overlap. A start token that a text holds itself is not added again. A last piece of one
    token is left out, because it has no token to predict.

    Raises:
        ValueError: the text cannot be read, or has too few pieces.
    """
    source = open_held_out_text(data)
    if source is None:
        return []
    frame = TextFrame(tokenizer)
    pieces: list[tuple[int, ...]] = []
    for number in range(source.num_rows):
        own = tokenizer(_text(source, number), add_special_tokens=False, verbose=False)["input_ids"]
        tokens = frame.framed(own)
        for start in range(0, len(tokens) - 1, data.max_length):
            pieces.append(tuple(tokens[start : start + data.max_length]))
        pieces = [piece for piece in pieces if len(piece) > 1]
        if data.num_forgetting is not None and len(pieces) >= data.num_forgetting:
            return pieces[: data.num_forgetting]
    if not pieces:
        raise ValueError(f"{source.title}: holds no two tokens in a row; allowed: a file with text")
    if data.num_forgetting is not None:
        raise ValueError(
            f"data.num_forgetting: {data.num_forgetting}: {source.name} has only {len(pieces)} pieces of at most "
            f"{data.max_length} tokens (data.max_length); allowed: at most that many, or null for all"
        )
    return pieces


def _text(source: RowSource, number: int) -> str:
    (row,) = source.read([number])
    fault = row if isinstance(row, BadRow) else text_fault(row.get("text"))
    if fault is not None or isinstance(row, BadRow):
        what = fault.what if isinstance(fault, BadRow) else f"column text: {fault}"
        raise BadRowError(f"{source.title}: {source.place(number)}: {what}; held-out text is read whole: mend the row")
    return row.get("text") or ""
