"""Computes losses without training: over all evaluation rows, or row by row."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from loragrid.data.dataset import TokenRows
from loragrid.models.sharding import is_sharded
from loragrid.training.batches import PackBatches
from loragrid.training.chunks import Chunks
from loragrid.training.failure import Failure, is_out_of_memory
from loragrid.training.meters import free_unused_memory
from loragrid.training.step import Batch, PackModel, SumOverWorkers

Scores = TypeVar("Scores")


def score_in_chunks(model: PackModel, chunks: Chunks, score: Callable[[], Scores]) -> Scores:
    """Return `score()`; whenever it runs out of memory, halve the chunks and call it again.

    A trial that could be trained can therefore be scored. Smaller chunks only change how sums are rounded, and they
    stay in use for later scoring. `score` must not communicate with other workers, because they may call it a different
    number of times.

    A lack of memory is raised only with chunks of one row; other exceptions are raised at once. With a sharded base a
    lack of memory is also raised at once, because all workers take part in every forward and would wait for this one.
    """
    while chunks.size > 1 and not is_sharded(model.base):
        try:
            return score()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = Failure.of(error).reason
        # Not in the handler: until it is left, the exception and its frames keep the memory.
        free_unused_memory(model.active.device)
        chunks.halve(reason)
    return score()


def evaluate(
    model: PackModel, batches: PackBatches, sum_over_workers: SumOverWorkers, *, frozen: bool = False
) -> Tensor:
    """The mean loss over the evaluation rows (M,); with `frozen`, that of the bare base (1,)."""
    total = score_in_chunks(model, batches.scoring, lambda: summed_losses(model, batches, frozen=frozen))
    sum_over_workers(total)
    return total / batches.num_eval_labels


@torch.no_grad()
def summed_losses(
    model: PackModel, batches: PackBatches, *, frozen: bool = False, num_batches: int | None = None
) -> Tensor:
    """The losses of this worker's evaluation rows, summed over their labels: (M,), with `frozen` (1,).

    num_batches: how many batches to use, from the first; None: all.
    """
    num_members = 1 if frozen else model.pack.num_members
    total = torch.zeros(num_members, dtype=torch.float64, device=model.active.device)
    with model.evaluating(), model.pack.disabled() if frozen else nullcontext():
        for batch in batches.evaluation(num_members)[:num_batches]:
            total += _losses(model, batch, frozen)
    return total


def _losses(model: PackModel, batch: Batch, frozen: bool) -> Tensor:
    """A batch's losses. The bare base never uses a capture, because it would contain the adapters."""
    return model.losses(batch) if frozen else model.evaluate_batch(model, batch)


def score_row_by_row(
    model: PackModel,
    batches: PackBatches,
    rows: TokenRows,
    sum_over_workers: SumOverWorkers,
    *,
    frozen: bool = False,
) -> Tensor:
    """The summed cross-entropy over the labels of every row, by member: (M, N) float64, the same in every worker.

    With `frozen`, (1, N) of the bare base.
    """
    scores = score_in_chunks(model, batches.scoring, lambda: _row_losses(model, batches, rows, frozen))
    sum_over_workers(scores)
    return scores


@torch.no_grad()
def _row_losses(model: PackModel, batches: PackBatches, rows: TokenRows, frozen: bool) -> Tensor:
    """As `score_row_by_row`, with zeros for the rows of other workers."""
    num_members, device = 1 if frozen else model.pack.num_members, model.active.device
    scores = torch.zeros(num_members, len(rows), dtype=torch.float64, device=device)
    with model.evaluating(), model.pack.disabled() if frozen else nullcontext():
        for start, batch in batches.by_row(rows, num_members):
            found = _losses(model, batch, frozen).view(num_members, -1)
            end = min(start + found.shape[1], len(rows))
            # Beyond the end are the rows that only fill up the batch.
            scores[:, start:end] = found[:, : max(end - start, 0)]
    return scores
