"""The losses of rows without training on them: over all evaluation rows, or row by row."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from loragrid.data.dataset import TokenRows
from loragrid.models.sharding import is_sharded
from loragrid.training.batches import PackBatches
from loragrid.training.chunks import Chunks
from loragrid.training.failure import Failure, is_out_of_memory
from loragrid.training.meters import free_unused_memory
from loragrid.training.step import Batch, PackModel, SumOverWorkers


def score_in_chunks(model: PackModel, chunks: Chunks, score: Callable[[], Tensor]) -> Tensor:
    """What `score` gives of this worker's rows; as often as the memory does not do for it, from half as many at once.

    So a trial that has been trained is scored, too: results are equal, up to the rounding of sums over other chunks.
    Smaller `chunks` stay for all that is scored in them from then on. `score` must call no other worker, so that
    each may go its own way. Raises what `score` does: for want of memory once it has a single row of each member at
    once; of a sharded base at once, for all workers take part in every forward, and the one without memory is missing.
    """
    while chunks.size > 1 and not is_sharded(model.base):
        try:
            return score()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = Failure.of(error).reason
        # Only here, where the exception and the frames it held are gone, is the memory free.
        free_unused_memory(model.active.device)
        chunks.halve(reason)
    return score()


def evaluate(
    model: PackModel, batches: PackBatches, sum_over_workers: SumOverWorkers, *, frozen: bool = False
) -> Tensor:
    """The mean loss over the evaluation rows, (M,); (1,) of the bare base with `frozen`."""
    total = score_in_chunks(model, batches.scoring, lambda: summed_losses(model, batches, frozen=frozen))
    sum_over_workers(total)
    return total / batches.num_eval_labels


@torch.no_grad()
def summed_losses(
    model: PackModel, batches: PackBatches, *, frozen: bool = False, num_batches: int | None = None
) -> Tensor:
    """The losses of this worker's evaluation rows, summed over their labels: as `evaluate`, of no other worker.

    num_batches: of so many batches alone.
    """
    num_members = 1 if frozen else model.pack.num_members
    total = torch.zeros(num_members, dtype=torch.float64, device=model.active.device)
    with model.evaluating(), model.pack.disabled() if frozen else nullcontext():
        for batch in batches.evaluation(num_members)[:num_batches]:
            total += _losses(model, batch, frozen)
    return total


def _losses(model: PackModel, batch: Batch, frozen: bool) -> Tensor:
    """Of the bare base never captured: a capture of the members has their adapters, and may have the same shape."""
    return model.losses(batch) if frozen else model.evaluate_batch(model, batch)


def score_rows_alone(
    model: PackModel,
    batches: PackBatches,
    rows: TokenRows,
    sum_over_workers: SumOverWorkers,
    *,
    frozen: bool = False,
) -> Tensor:
    """The summed cross-entropy over the labels of every row, by member: (M, N) float64, the same in every worker.

    (1, N) of the bare base with `frozen`.
    """
    scores = score_in_chunks(model, batches.scoring, lambda: _row_losses(model, batches, rows, frozen))
    sum_over_workers(scores)
    return scores


@torch.no_grad()
def _row_losses(model: PackModel, batches: PackBatches, rows: TokenRows, frozen: bool) -> Tensor:
    """As `score_rows_alone`, zero where the row is another worker's."""
    num_members, device = 1 if frozen else model.pack.num_members, model.active.device
    scores = torch.zeros(num_members, len(rows), dtype=torch.float64, device=device)
    with model.evaluating(), model.pack.disabled() if frozen else nullcontext():
        for start, batch in batches.by_row(rows, num_members):
            found = _losses(model, batch, frozen).view(num_members, -1)
            end = min(start + found.shape[1], len(rows))
            # Past the end stands what only fills the batch.
            scores[:, start:end] = found[:, : max(end - start, 0)]
    return scores
