"""Turns the rows of an experiment into tensors of one static shape, and selects the rows of each step."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.bad_rows import Examples, RowFaults
from loragrid.data.chats.template import template_texts
from loragrid.data.deck import ChosenRow, permutation
from loragrid.data.held_out_text import held_out_pieces
from loragrid.data.labelled_tokens import LabelledTokens
from loragrid.data.labels import IGNORED
from loragrid.data.made_from import made_from
from loragrid.data.overlap import overlap_with_train
from loragrid.data.splits import SPLITS, choose_rows, open_sources
from loragrid.models.cache import DamagedError, cache_folder, read_cached
from loragrid.models.loading import max_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenRows:
    """N rows of L tokens with at most C labels each; every batch is cut from these and has the same L and C.

    input_ids (N, L) int64, right-padded with the pad token.
    label_positions (N, C) int64: positions p whose hidden state predicts the token at p + 1; 0 in the padding.
    label_targets (N, C) int64: the tokens to predict; -100 in the padding.
    num_tokens (N,) int64: tokens that are not padding.
    groups (N,) int64: the group of each row; rows of one group are dependent, and in no two splits.
    """

    input_ids: Tensor
    label_positions: Tensor
    label_targets: Tensor
    num_tokens: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """Number of labels in all rows."""
        return int((self.label_targets != IGNORED).sum())

    @property
    def num_groups(self) -> int:
        """Number of different groups."""
        return len(self.groups.unique())

    def group_digests(self) -> list[str]:
        """The group of each row as 16 hexadecimal digits, equal for equal groups in all sweeps."""
        return [f"{group % 2**64:016x}" for group in self.groups.tolist()]

    def digests(self) -> list[str]:
        """A digest of each row's tokens and label positions: 16 hexadecimal digits."""
        found = []
        for ids, positions, targets, length in zip(
            self.input_ids, self.label_positions, self.label_targets, self.num_tokens.tolist(), strict=True
        ):
            content = json.dumps([ids[:length].tolist(), positions[targets != IGNORED].tolist()])
            found.append(hashlib.sha256(content.encode()).hexdigest()[:16])
        return found

    def select(self, indices: Tensor) -> "TokenRows":
        """The rows numbered `indices` (K,), in that order."""
        return TokenRows(*(getattr(self, part.name)[indices] for part in fields(self)))


@dataclass(frozen=True)
class TokenizedData:
    """All rows of an experiment.

    test: has 0 rows if `num_test` is 0. skipped: reason -> number of rows that were read but not used. examples:
    see `Examples`. notes: name in `ROW_NOTES` -> number of used rows about which it was noticed. digest:
    identifies the tokens and groups of all splits. num_source_rows: number of rows in the train source. overlap: see
    `overlap_with_train`. made_from: what the rows depend on, such as the sources' digests. held_out_text: plain text
    with its own shapes; it is never cached. chat_template: the text of the template that `data.chat_template` chose,
    which exports need; None if the rows use the tokenizer's default. remark: what happened while the rows were loaded
    and a user should know.
    """

    train: TokenRows
    evaluation: TokenRows
    test: TokenRows
    skipped: dict[str, int]
    digest: str
    num_source_rows: int
    examples: Examples = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    overlap: Mapping[str, int] = field(default_factory=dict)
    made_from: Mapping[str, Any] = field(default_factory=dict)
    held_out_text: TokenRows | None = None
    chat_template: str | None = None
    remark: str = ""

    @property
    def largest_token(self) -> int:
        """The largest token id of all rows, padding included: the embedding needs at least one row more."""
        rows = (self.train, self.evaluation, self.test, self.held_out_text)
        return max(int(part.input_ids.max()) for part in rows if part is not None and part.input_ids.numel())

    def id_bounds(self) -> list[int]:
        """The smallest and the largest token id of each split and of the held-out text, padding included."""
        parts = (self.train, self.evaluation, self.test, *([self.held_out_text] if self.held_out_text else []))
        return [int(bound) for rows in parts if len(rows) for bound in torch.aminmax(rows.input_ids)]


def load_data(data: DataConfig, model: ModelConfig, tokenizer: "PreTrainedTokenizerBase") -> TokenizedData:
    """Tokenize the rows, or load them from the cache of an earlier call with the same rows, settings and tokenizer.

    The choice of rows for each split depends only on `data` and the rows, never on a seed. Rows that have the tokens or
    the group of a row of an earlier split (in the order evaluation, test, train) are skipped and counted.

    Raises:
        ValueError: rows that cannot be found or read, wrong columns, too few usable rows, or a `max_length` beyond the
            model's context.
    """
    context = max_context(model)
    if context is not None and data.max_length > context:
        raise ValueError(
            f"data.max_length: {data.max_length}: longer than the context of {model.name}; allowed: at most {context}"
        )
    sources = open_sources(data, tokenizer)
    parts = made_from(data, sources, tokenizer)
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def fill(folder: Path) -> None:
        skipped: Counter[str] = Counter()
        faults = RowFaults()
        splits = choose_rows(data, sources, skipped, faults)
        assert tokenizer.pad_token_id is not None, "load_tokenizer sets a pad token"
        texts = {split: [row.texts for row in rows] for split, rows in splits.items()}
        counts = {
            "skipped": dict(sorted(skipped.items())),
            "examples": faults.examples(),
            "num_source_rows": sources["train"].rows.num_rows,
            "notes": dict(Counter(note for rows in splits.values() for row in rows for note in row.tokens.notes)),
            "overlap": overlap_with_train(texts),
        }
        _save(folder, splits, int(tokenizer.pad_token_id), counts)

    pieces = [LabelledTokens(piece, tuple(range(len(piece) - 1))) for piece in held_out_pieces(data, tokenizer)]
    folder = cache_folder() / "tokens" / name
    loaded, damage = read_cached(folder, fill, _load)
    remark = f"the rows stored in {folder} were damaged ({damage}); they are tokenised and stored again"
    return replace(
        loaded,
        remark=remark if damage else "",
        made_from=parts,
        chat_template=None if data.chat_template is None else template_texts(tokenizer, data.chat_template)["default"],
        held_out_text=pad_rows(pieces, int(tokenizer.pad_token_id or 0)) if pieces else None,
    )


def batch_indices(num_rows: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The row numbers (batch_size,) of a step, counted from 0. A pure function: resuming needs no state.

    Every epoch takes all rows in an order that depends on seed and epoch. A batch can hold the last rows of one epoch
    and the first rows of the next.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows: {num_rows}: there must be rows to take a batch from")
    position, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while position < end:
        epoch, start = divmod(position, num_rows)
        part = permutation(num_rows, f"epoch {epoch} of seed {seed}")[start : start + end - position]
        parts.append(part)
        position += len(part)
    return torch.cat(parts)


def _save(
    folder: Path, splits: Mapping[str, Sequence[ChosenRow]], pad_token_id: int, counts: Mapping[str, object]
) -> None:
    """Write the rows and what was counted while they were chosen; the digest covers the tensors of all splits."""
    from safetensors.torch import save_file

    all_rows = [row.tokens for rows in splits.values() for row in rows]
    padded = {
        split: pad_rows(
            [row.tokens for row in rows],
            pad_token_id,
            groups=torch.tensor([row.group for row in rows], dtype=torch.int64),
            shaped_by=all_rows,
        )
        for split, rows in splits.items()
    }
    tensors = {
        f"{split}.{name}": tensor if name == "groups" else tensor.to(torch.int32)
        for split, rows in padded.items()
        for name, tensor in vars(rows).items()
    }
    save_file(tensors, folder / "rows.safetensors")
    summary = {**counts, "digest": _digest(padded)}
    content = json.dumps(summary)
    stored = {"summary": content, "sha256": hashlib.sha256(content.encode()).hexdigest()}
    (folder / "summary.json").write_text(json.dumps(stored), encoding="utf-8")


def _digest(splits: Mapping[str, TokenRows]) -> str:
    """Identifies the tensors of all splits."""
    digest = hashlib.sha256()
    for split, rows in splits.items():
        for name, tensor in sorted(vars(rows).items()):
            digest.update(f"{split}.{name} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def pad_rows(
    rows: Sequence[LabelledTokens],
    pad_token_id: int,
    *,
    groups: Tensor | None = None,
    shaped_by: Sequence[LabelledTokens] | None = None,
) -> TokenRows:
    """Pad rows to the most tokens and the most labels of any row in `shaped_by` (None: in `rows`).

    groups (N,): the rows' groups; None: every row is a group of its own.
    """
    length = max(len(row.input_ids) for row in shaped_by or rows)
    num_labels = max(len(row.label_positions) for row in shaped_by or rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    label_positions = torch.zeros((len(rows), num_labels), dtype=torch.int64)
    label_targets = torch.full((len(rows), num_labels), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids, positions = torch.tensor(row.input_ids), torch.tensor(row.label_positions)
        input_ids[index, : len(ids)] = ids
        label_positions[index, : len(positions)] = positions
        label_targets[index, : len(positions)] = ids[positions + 1]
    num_tokens = torch.tensor([len(row.input_ids) for row in rows], dtype=torch.int64)
    return TokenRows(
        input_ids, label_positions, label_targets, num_tokens, torch.arange(len(rows)) if groups is None else groups
    )


def _load(folder: Path) -> TokenizedData:
    """The rows that `_save` wrote; raises DamagedError if they are not as it wrote them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / "rows.safetensors")
        stored = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        is_whole = stored["sha256"] == hashlib.sha256(stored["summary"].encode()).hexdigest()
        splits = {
            split: TokenRows(*(tensors[f"{split}.{part.name}"].to(torch.int64) for part in fields(TokenRows)))
            for split in SPLITS
        }
        found = TokenizedData(
            train=splits["train"], evaluation=splits["evaluation"], test=splits["test"], **json.loads(stored["summary"])
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    if not is_whole or found.digest != _digest(splits):
        raise DamagedError("their digest is another than when they were written")
    return found
