"""Refuses tokens that the base's embedding lacks: on a GPU, looking one up ends the whole process."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SPECIAL_TOKENS = ("pad", "bos", "eos")


def check_vocabulary(
    vocabulary: "PretrainedConfig | int",
    tokenizer: "PreTrainedTokenizerBase | None",
    token_ids: Iterable[int] = (),
    *,
    name: str | None = None,
) -> None:
    """Check that the base has an embedding for the special tokens and for every id in `token_ids`.

    It needs no weights. vocabulary: the base's config, or the number of rows of its embedding. token_ids: ids that rows
    really hold; the largest and the smallest decide. name: the value of model.name, by default the tokenizer's. A
    tokenizer may know more tokens than the base if no row holds them.

    Raises:
        ValueError: an id is beyond the embedding; the message names the token and the remedy.
    """
    num_rows = vocabulary if isinstance(vocabulary, int) else vocabulary_of(vocabulary)
    start = f"model.name: {name or getattr(tokenizer, 'name_or_path', '')}: "
    if num_rows is None:
        return
    if tokenizer is not None:
        for kind in SPECIAL_TOKENS:
            if _is_beyond(getattr(tokenizer, f"{kind}_token_id", None), num_rows):
                token, number = getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")
                raise ValueError(
                    _refusal(start, f"the tokenizer's {kind} token {token!r} has the id {number:,}", num_rows)
                )
    ids = [int(token_id) for token_id in token_ids]
    for number in sorted({min(ids), max(ids)}) if ids else ():
        if _is_beyond(number, num_rows):
            token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens([number])[0]!r})"
            raise ValueError(_refusal(start, f"a row holds the token id {number:,}{token}", num_rows))


def vocabulary_of(config: "PretrainedConfig") -> int | None:
    """The rows of the embedding that a config describes; None if it names no number."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def embedding_rows(base: "PreTrainedModel") -> int:
    """The rows of a base's embedding: ids from 0 up to this number have one."""
    embeddings: Any = base.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _is_beyond(number: int | None, num_rows: int) -> bool:
    return number is not None and not 0 <= number < num_rows


def _refusal(start: str, what: str, num_rows: int) -> str:
    return (
        f"{start}{what}, and the base's embedding has {num_rows:,} rows (ids 0 to {num_rows - 1:,}): the tokenizer is "
        "another model's, or tokens were added to it alone; use the base's own tokenizer, or enlarge the base "
        "(resize_token_embeddings(len(tokenizer)) in transformers) and save both"
    )
