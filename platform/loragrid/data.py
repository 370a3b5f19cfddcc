"""Turns the rows of an experiment into tensors of one static shape, once, and says which rows each step takes."""

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loragrid.cache import cache_folder, cached_folder
from loragrid.config import DataConfig, ModelConfig
from loragrid.loss import IGNORED
from loragrid.models import max_context
from loragrid.rows import RowSource, find_columns, open_eval_rows, open_train_rows
from loragrid.tokenization import LabelledTokens, RowTokenizer, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
SAME_AS_EVAL = "same as an eval row"
MOST_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class TokenRows:
    """N rows of L tokens with at most C labels each; every step's batch is cut from these and has their L and C.

    input_ids (N, L) int64, right-padded with the pad token.
    label_positions (N, C) int64: positions p whose hidden state predicts the token at p + 1; 0 in the padding.
    label_targets (N, C) int64: the tokens to predict; -100 in the padding.
    num_tokens (N,) int64: tokens that are not padding.
    """

    input_ids: Tensor
    label_positions: Tensor
    label_targets: Tensor
    num_tokens: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """Labels of all rows together."""
        return int((self.label_targets != IGNORED).sum())

    def select(self, indices: Tensor) -> "TokenRows":
        """The rows numbered `indices` (K,), in that order."""
        return TokenRows(*(getattr(self, field.name)[indices] for field in fields(self)))


@dataclass(frozen=True)
class TokenizedData:
    """All rows of an experiment.

    skipped: reason -> rows that were read but not used. digest: of the tokens. num_source_rows: in the train source.
    """

    train: TokenRows
    evaluation: TokenRows
    skipped: dict[str, int]
    digest: str
    num_source_rows: int


def load_data(data: DataConfig, model: ModelConfig, tokenizer: "PreTrainedTokenizerBase") -> TokenizedData:
    """Tokenize the rows, or load what an earlier call with the same rows, settings and tokenizer has stored.

    Which rows are taken, and which of them evaluate, depends on nothing but `data` and the rows: never on a seed. Train
    rows that are token for token an eval row are skipped and counted.

    Raises:
        ValueError: rows that cannot be found or read, wrong columns, too few usable rows, or a `max_length` that is
            beyond the model's context.
    """
    context = max_context(model)
    if context is not None and data.max_length > context:
        raise ValueError(
            f"data.max_length: {data.max_length}: longer than the context of {model.name}; allowed: at most {context}"
        )
    train, evaluation = open_train_rows(data), open_eval_rows(data)
    train_tokenizer = _row_tokenizer(train, data, tokenizer)
    eval_tokenizer = train_tokenizer if evaluation is None else _row_tokenizer(evaluation, data, tokenizer)
    key = {
        "format": [FORMAT_VERSION, importlib.metadata.version("transformers")],
        "train": train.fingerprint,
        "evaluation": None if evaluation is None else evaluation.fingerprint,
        "columns": [train_tokenizer.columns, eval_tokenizer.columns],
        "tokenizer": tokenizer_digest(tokenizer),
        "settings": data.model_dump(mode="json", include={"max_length", "num_train", "num_eval", "loss_on"}),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

    def fill(folder: Path) -> None:
        skipped: Counter[str] = Counter()
        eval_rows, train_rows = _choose_rows(data, train, train_tokenizer, evaluation, eval_tokenizer, skipped)
        assert tokenizer.pad_token_id is not None, "load_tokenizer sees to a pad token"
        _save(folder, train_rows, eval_rows, int(tokenizer.pad_token_id), skipped, train.num_rows)

    return _load(cached_folder(cache_folder() / "tokens" / name, fill))


def batch_indices(num_rows: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The rows (batch_size,) of step `step`, counted from 0; a pure function, so resuming needs no state.

    Every epoch goes through all rows in an order of its own, drawn from seed and epoch. A batch may take the last rows
    of one epoch and the first of the next.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows: {num_rows}: there must be rows to take a batch from")
    position, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while position < end:
        epoch, start = divmod(position, num_rows)
        part = _permutation(num_rows, f"epoch {epoch} of seed {seed}")[start : start + end - position]
        parts.append(part)
        position += len(part)
    return torch.cat(parts)


def _permutation(num_rows: int, purpose: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7], "big")
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))


def _row_tokenizer(source: RowSource, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> RowTokenizer:
    if source.num_rows == 0:
        raise ValueError(f"{source.title}: has no rows")
    return RowTokenizer(
        tokenizer,
        find_columns(source, data.columns),
        max_length=data.max_length,
        loss_on=data.loss_on,
        title=source.title,
    )


def _choose_rows(
    data: DataConfig,
    train: RowSource,
    train_tokenizer: RowTokenizer,
    evaluation: RowSource | None,
    eval_tokenizer: RowTokenizer,
    skipped: Counter[str],
) -> tuple[list[LabelledTokens], list[LabelledTokens]]:
    """Draw eval rows, then train rows, from the usable ones; tokenizes no more rows than that takes."""
    order = _permutation(train.num_rows, "train rows").tolist()
    if evaluation is None:
        eval_rows, num_seen = _take(train, train_tokenizer, order, data.num_eval, skipped, set())
        order = order[num_seen:]
    else:
        eval_order = _permutation(evaluation.num_rows, "eval rows").tolist()
        eval_rows, _ = _take(evaluation, eval_tokenizer, eval_order, data.num_eval, skipped, set())
    source = train if evaluation is None else evaluation
    if not eval_rows:
        raise ValueError(f"{source.title}: none of its {source.num_rows} rows can be used{_counts(skipped)}")
    if len(eval_rows) < data.num_eval:
        raise ValueError(
            f"data.num_eval: {data.num_eval}: {source.name} has only {len(eval_rows)} rows that can be "
            f"used{_counts(skipped)}; allowed: at most that many, and one fewer where the train rows come from it too"
        )
    train_rows, _ = _take(train, train_tokenizer, order, data.num_train, skipped, {row.input_ids for row in eval_rows})
    if not train_rows:
        what = f"beside the {len(eval_rows)} eval rows (data.num_eval) " if evaluation is None else ""
        raise ValueError(f"{train.title}: {what}none of its {train.num_rows} rows can be used{_counts(skipped)}")
    if data.num_train is not None and len(train_rows) < data.num_train:
        raise ValueError(
            f"data.num_train: {data.num_train}: {train.name} has only {len(train_rows)} train rows that can be "
            f"used{_counts(skipped)}; allowed: at most that many, or null for all"
        )
    return eval_rows, train_rows


def _take(
    source: RowSource,
    tokenizer: RowTokenizer,
    order: Sequence[int],
    num_wanted: int | None,
    skipped: Counter[str],
    refused: set[tuple[int, ...]],
) -> tuple[list[LabelledTokens], int]:
    """The first `num_wanted` (None: all) usable rows in `order`, and how many rows had to be seen for them."""
    taken: list[LabelledTokens] = []
    num_seen = 0
    while num_seen < len(order) and (num_wanted is None or len(taken) < num_wanted):
        num_missing = MOST_ROWS_AT_ONCE if num_wanted is None else num_wanted - len(taken)
        # Never more than are missing: a usable row that is seen is a row that is taken.
        indices = order[num_seen : num_seen + min(num_missing, MOST_ROWS_AT_ONCE)]
        for row in tokenizer.tokenize(source.read(indices), indices):
            if isinstance(row, str):
                skipped[row] += 1
            elif row.input_ids in refused:
                skipped[SAME_AS_EVAL] += 1
            else:
                taken.append(row)
        num_seen += len(indices)
    return taken, num_seen


def _counts(skipped: Counter[str]) -> str:
    """The skipped rows in the words of an error, " (skipped: 3 empty text)"; nothing where none was."""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    return f" (skipped: {counts})" if counts else ""


def _save(
    folder: Path,
    train: Sequence[LabelledTokens],
    evaluation: Sequence[LabelledTokens],
    pad_token_id: int,
    skipped: Counter[str],
    num_source_rows: int,
) -> None:
    from safetensors.torch import save_file

    both = [*train, *evaluation]
    length = max(len(row.input_ids) for row in both)
    num_labels = max(len(row.label_positions) for row in both)
    tensors = {}
    digest = hashlib.sha256()
    for part, rows in (("train", train), ("evaluation", evaluation)):
        padded = _pad(rows, length, num_labels, pad_token_id)
        for name, tensor in sorted(vars(padded).items()):
            digest.update(f"{part}.{name} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
            tensors[f"{part}.{name}"] = tensor.to(torch.int32)
    save_file(tensors, folder / "rows.safetensors")
    summary = {"skipped": dict(sorted(skipped.items())), "digest": f"sha256:{digest.hexdigest()}"}
    (folder / "summary.json").write_text(json.dumps(summary | {"num_source_rows": num_source_rows}), encoding="utf-8")


def _pad(rows: Sequence[LabelledTokens], length: int, num_labels: int, pad_token_id: int) -> TokenRows:
    """Rows of different lengths -> input_ids (N, length), label_positions and label_targets (N, num_labels)."""
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    label_positions = torch.zeros((len(rows), num_labels), dtype=torch.int64)
    label_targets = torch.full((len(rows), num_labels), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids, positions = torch.tensor(row.input_ids), torch.tensor(row.label_positions)
        input_ids[index, : len(ids)] = ids
        label_positions[index, : len(positions)] = positions
        label_targets[index, : len(positions)] = ids[positions + 1]
    return TokenRows(input_ids, label_positions, label_targets, torch.tensor([len(row.input_ids) for row in rows]))


def _load(folder: Path) -> TokenizedData:
    from safetensors.torch import load_file

    tensors = load_file(folder / "rows.safetensors")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    parts = {
        part: TokenRows(*(tensors[f"{part}.{field.name}"].to(torch.int64) for field in fields(TokenRows)))
        for part in ("train", "evaluation")
    }
    return TokenizedData(train=parts["train"], evaluation=parts["evaluation"], **summary)
