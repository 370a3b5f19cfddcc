"""The losses of rows without training on them: over all evaluation rows, or row by row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from loragrid.batches import PackBatches
from loragrid.data import TokenRows
from loragrid.step import Batch, PackModel, SumOverWorkers


@torch.no_grad()
def evaluate(
    model: PackModel,
    batches: Sequence[Batch],
    num_labels: int,
    sum_over_workers: SumOverWorkers,
    *,
    frozen: bool = False,
) -> Tensor:
    """The mean loss over the evaluation rows, (M,); (1,) of the bare base with `frozen`.

    `batches` are this worker's share (for `frozen`: with the rows of one member), each with `num_labels` of ones, so
    that it gives sums; `num_labels` counts the labels of all workers.
    """
    device = model.active.device
    total = torch.zeros(1 if frozen else model.pack.num_members, dtype=torch.float64, device=device)
    with _evaluating(model), model.pack.disabled() if frozen else nullcontext():
        for batch in batches:
            total += model.losses(batch)
    sum_over_workers(total)
    return total / num_labels


@torch.no_grad()
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
    num_members, device = 1 if frozen else model.pack.num_members, model.active.device
    scores = torch.zeros(num_members, len(rows), dtype=torch.float64, device=device)
    with _evaluating(model), model.pack.disabled() if frozen else nullcontext():
        for start, batch in batches.by_row(rows, num_members):
            found = model.losses(batch).view(num_members, -1)
            end = min(start + found.shape[1], len(rows))
            # Past the end stands what only fills the batch.
            scores[:, start:end] = found[:, : max(end - start, 0)]
    sum_over_workers(scores)
    return scores


@contextmanager
def _evaluating(model: PackModel) -> Iterator[None]:
    """Within, the adapters are in evaluation mode. Compiled layers are compiled for training: they run uncompiled."""
    model.pack.train(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.pack.train(True)
