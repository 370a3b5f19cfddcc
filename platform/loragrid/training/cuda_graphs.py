"""Captures a step, and the evaluation of a batch, as CUDA graphs that are replayed on the same tensors."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor

from loragrid.training.meters import Stopwatch
from loragrid.training.step import (
    Batch,
    PackModel,
    StepResult,
    SumOverWorkers,
    add_up_gradients,
    sum_gradients_and_losses,
    update_members,
)

STEPS_BEFORE_CAPTURE = 3
"""Real steps that run first: they allocate cuBLAS's workspaces and compile kernels, which a capture cannot do."""

BATCHES_BEFORE_CAPTURE = 3
"""Batches of one shape that are evaluated eagerly first, because a capture takes as long as several batches."""

Shapes = tuple[torch.Size, ...]
"""The shapes of a batch's tensors."""


class CapturedStep:
    """One step as two CUDA graphs, with the tensors they read and write. Capturing computes nothing.

    The first graph ends with this worker's gradients, the second begins with the sum over all workers. The sum itself
    is not captured. Any process group can therefore compute it, its timeout works, and a worker whose capture failed
    still takes part in it.
    """

    def __init__(self, model: PackModel, batch: Batch, rates: Tensor) -> None:
        self.model = model
        self.batch = batch.clone()
        self.rates = rates.clone()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # graphs have their own memory pool
        self.gradients, self.update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _capture(self.gradients):
            self.losses = add_up_gradients(model, self.batch)
        with _capture(self.update, after=self.gradients):
            self.norms = update_members(model, self.losses, self.rates)

    def replay(self, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
        """Run the step on another batch and other learning rates (M,)."""
        self.batch.copy_(batch)
        self.rates.copy_(rates)
        self.gradients.replay()
        sum_gradients_and_losses(self.model, self.losses, sum_over_workers)
        self.update.replay()
        return StepResult(losses=self.losses.clone(), gradient_norms=self.norms.clone())


class CapturedEvaluation:
    """`EvaluateBatch` with one CUDA graph per shape of batch, captured after some batches that run eagerly.

    The graphs share the memory pool of the captured `step`, so each result is copied out before another graph is
    replayed; evaluation adds almost no memory. If a capture fails, batches are evaluated eagerly from then on (only
    those of that shape if memory was short), and `obstacle` holds the reason.
    """

    def __init__(self, step: torch.cuda.CUDAGraph, stopwatch: Stopwatch) -> None:
        self._step, self._stopwatch = step, stopwatch
        self._num_before: Counter[Shapes] = Counter()
        self._captured: dict[Shapes, _CapturedBatch | None] = {}
        """None: this shape is not captured."""
        self._is_rehearsed = False
        self.obstacle = ""

    def __call__(self, model: PackModel, batch: Batch) -> Tensor:
        """As `EvaluateBatch`."""
        shapes = tuple(getattr(batch, field.name).shape for field in fields(batch))
        if shapes not in self._captured:
            if self._num_before[shapes] < BATCHES_BEFORE_CAPTURE:
                self._num_before[shapes] += 1
                return model.losses(batch)
            self._captured[shapes] = self._try_to_capture(model, batch)
        captured = self._captured[shapes]
        return model.losses(batch) if captured is None else captured.replay(batch)

    def _try_to_capture(self, model: PackModel, batch: Batch) -> "_CapturedBatch | None":
        """The captured batch; None if the capture fails.

        The first time, a single row is captured before it, in its own memory pool. A capture that meets a forbidden
        operation never releases its memory, so it must not happen in the step's pool. A capture that runs out of memory
        does release it.
        """
        if self.obstacle and not self._is_rehearsed:
            return None
        torch.cuda.synchronize()  # queued work must not count as time of the capture
        try:
            with self._stopwatch.phase("compile"):
                if not self._is_rehearsed:
                    _CapturedBatch(model, batch.first_rows(model.pack.num_members), None)
                    self._is_rehearsed = True
                return _CapturedBatch(model, batch, self._step)
        except RuntimeError as error:
            recover_from_failed_capture()
            self.obstacle = str(error).splitlines()[0]
            return None


class _CapturedBatch:
    """The losses of one shape of batch as a CUDA graph, with the tensors it reads and writes."""

    def __init__(self, model: PackModel, batch: Batch, step: torch.cuda.CUDAGraph | None) -> None:
        self.batch = batch.clone()
        self.graph = torch.cuda.CUDAGraph()
        with _capture(self.graph, after=step):
            self.losses = model.losses(self.batch)

    def replay(self, batch: Batch) -> Tensor:
        self.batch.copy_(batch)
        self.graph.replay()
        return self.losses.clone()


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, after: torch.cuda.CUDAGraph | None = None) -> Iterator[None]:
    """Capture what this thread launches inside the context; NCCL's threads may query their events meanwhile.

    after: the graph whose memory pool is shared; the two must never be replayed at the same time.
    """
    pool = None if after is None else after.pool()
    # The outer context restores the current stream: after a failed capture torch would stay on the capture's stream.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, stream=capture_stream(), capture_error_mode="thread_local"),
    ):
        yield


def recover_from_failed_capture() -> None:
    """Make the device's random generator usable again: after a failed capture, only a successful one releases it.

    LoraGrid draws from its own generators, so training continues even if this capture fails, too.
    """
    torch.cuda.synchronize()
    with suppress(RuntimeError), _capture(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


@cache
def capture_stream() -> torch.cuda.Stream:
    """One stream for the whole process: every stream keeps its own cuBLAS workspace and allocator pool."""
    return torch.cuda.Stream()
