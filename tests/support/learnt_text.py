"""Shows what a chat teaches: the text of each row with the learnt runs in [[ ]]."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loragrid.config.experiment import DataConfig
from loragrid.data.bad_rows import BadRow
from loragrid.data.chats.tokenizer import ChatTokenizer
from loragrid.data.labelled_tokens import LabelledTokens, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def learn(tokenizer: "PreTrainedTokenizerBase", *rows: Any, **keys: Any) -> list[Tokenized]:
    """What becomes of chats: rows with messages, or the messages themselves. keys: of the section `data`."""
    data = DataConfig(name="chats.jsonl", **keys)
    given = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    return ChatTokenizer(tokenizer, data, title="data.name: chats.jsonl").tokenize(given)


def shown(tokenizer: "PreTrainedTokenizerBase", row: LabelledTokens) -> str:
    """The row's text with the learnt runs of tokens in [[ ]]."""
    labels = {position + 1 for position in row.label_positions}
    runs: list[tuple[bool, list[int]]] = []
    for number, token in enumerate(row.input_ids):
        if not runs or runs[-1][0] != (number in labels):
            runs.append((number in labels, []))
        runs[-1][1].append(token)
    texts = [(is_learnt, _decoded(tokenizer, ids)) for is_learnt, ids in runs]
    return "".join(f"[[{text}]]" if is_learnt else text for is_learnt, text in texts)


def learnt_runs(tokenizer: "PreTrainedTokenizerBase", *rows: Any, **keys: Any) -> list[list[str]]:
    """The learnt runs of every row that the chats become."""
    found = []
    for tokenized in learn(tokenizer, *rows, **keys):
        assert isinstance(tokenized, tuple), tokenized
        for row in tokenized:
            found.append([part.split("]]")[0] for part in shown(tokenizer, row).split("[[")[1:]])
    return found


def notes(tokenizer: "PreTrainedTokenizerBase", *rows: Any, **keys: Any) -> list[tuple[str, ...]]:
    """The notes of every row that the chats become."""
    found = []
    for tokenized in learn(tokenizer, *rows, **keys):
        assert isinstance(tokenized, tuple), tokenized
        found += [row.notes for row in tokenized]
    return found


def refusal(tokenizer: "PreTrainedTokenizerBase", row: Any, **keys: Any) -> str:
    """Why a chat is refused."""
    (found,) = learn(tokenizer, row, **keys)
    assert isinstance(found, BadRow), found
    return found.what


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
