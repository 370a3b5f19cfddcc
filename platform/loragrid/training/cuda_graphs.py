"""Runs the steps of a pack: kernel by kernel, or captured once as CUDA graphs and replayed."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loragrid.models.activation_checkpointing import decoder_layers
from loragrid.training.loss import fusible_score_rows
from loragrid.training.meters import Stopwatch
from loragrid.training.step import (
    Batch,
    PackModel,
    StepResult,
    SumOverWorkers,
    add_up_gradients,
    compute_step,
    sum_gradients_and_losses,
    update_members,
)
from loragrid.training.step_mode import MODE_TAG, EngineChoice
from loragrid_methods.stacks.optimizer import adamw_update

# Real steps run before the capture: they make cuBLAS's workspaces and the compiled kernels, which a capture cannot.
STEPS_BEFORE_CAPTURE = 3
# A capture takes as long as some batches: fewer are not worth one.
BATCHES_BEFORE_CAPTURE = 3

Shapes = tuple[torch.Size, ...]
"""Those of a batch's tensors."""


class Engine:
    """`compute_step` in the mode of `choice`.

    A captured step is replayed on the same tensors, so batches must keep their shapes; learning rates, stop marks and
    step counts are tensors, and a capture outlives every schedule. What must not be captured (checkpoints, what follows
    a step) runs outside and finds the same tensors. Once a step is captured, evaluation is, too. Where a capture fails
    the steps go on eagerly, and `choice` says why. `stopwatch` counts as `compile` the first step, which compiles what
    is compiled, and the captures.
    """

    def __init__(self, choice: EngineChoice, stopwatch: Stopwatch | None = None) -> None:
        self.choice = choice
        self._stopwatch = stopwatch or Stopwatch()
        self._num_before = 0
        self._captured: _Captured | None = None
        self._evaluation: CapturedEvaluation | None = None

    def __call__(self, model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
        """As `compute_step`."""
        if self.choice.mode == "eager":
            return compute_step(model, batch, rates, sum_over_workers)
        if self._num_before < STEPS_BEFORE_CAPTURE:
            self._num_before += 1
            if self._num_before > 1:
                return self._compute_beside(model, batch, rates, sum_over_workers)
            torch.cuda.synchronize()
            with self._stopwatch.phase("compile"):
                result = self._compute_beside(model, batch, rates, sum_over_workers)
                torch.cuda.synchronize()
            return result
        if self._captured is None:
            try:
                torch.cuda.synchronize()
                with self._stopwatch.phase("compile"):
                    self._captured = _Captured(model, batch, rates)
            except torch.OutOfMemoryError:
                raise  # a smaller pack may be captured
            except RuntimeError as error:
                _recover_from_failed_capture()
                reason = f"the step could not be captured: {str(error).splitlines()[0]}"
                self.choice = EngineChoice(mode="eager", reason=reason)
                return compute_step(model, batch, rates, sum_over_workers)
            self._evaluation = CapturedEvaluation(self._captured.gradients, self._stopwatch)
            model.evaluate_batch = self._evaluation
        return self._captured.replay(batch, rates, sum_over_workers)

    def _compute_beside(
        self, model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers
    ) -> StepResult:
        """A step on the stream of the capture, as steps before one must be."""
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = compute_step(model, batch, rates, sum_over_workers)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def tags(self) -> dict[str, str]:
        """How the steps are run, as MLflow tags."""
        tags = {MODE_TAG: self.choice.mode, f"{MODE_TAG}.reason": self.choice.reason}
        if self._evaluation is not None and self._evaluation.obstacle:
            tags[f"{MODE_TAG}.evaluation"] = f"eager: {self._evaluation.obstacle}"
        return tags


class _Captured:
    """One step as two CUDA graphs, with the tensors they read and write. Capturing computes nothing.

    The first ends with this worker's gradients, the second begins with all workers' sum. The sum itself stays outside:
    any process group can do it, its deadline counts, and a worker whose capture failed still meets the others in it.
    """

    def __init__(self, model: PackModel, batch: Batch, rates: Tensor) -> None:
        self.model = model
        self.batch = batch.clone()
        self.rates = rates.clone()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # graphs have a memory pool of their own
        self.gradients, self.update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _capture(self.gradients):
            self.losses = add_up_gradients(model, self.batch)
        with _capture(self.update, after=self.gradients):
            self.norms = update_members(model, self.losses, self.rates)

    def replay(self, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
        self.batch.copy_(batch)
        self.rates.copy_(rates)
        self.gradients.replay()
        sum_gradients_and_losses(self.model, self.losses, sum_over_workers)
        self.update.replay()
        return StepResult(losses=self.losses.clone(), gradient_norms=self.norms.clone())


class CapturedEvaluation:
    """`EvaluateBatch` with one CUDA graph for every shape of batch, captured after some that were evaluated eagerly.

    The graphs use the memory of the captured `step` again. So what one of them gives is copied before any other is
    replayed, and they need hardly any that training does not keep for itself. Where a capture fails, batches are
    evaluated eagerly from then on, for want of memory those of that shape, and `obstacle` says why.
    """

    def __init__(self, step: torch.cuda.CUDAGraph, stopwatch: Stopwatch) -> None:
        self._step, self._stopwatch = step, stopwatch
        self._num_before: Counter[Shapes] = Counter()
        self._captured: dict[Shapes, _CapturedBatch | None] = {}
        """None: not to be captured."""
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
        """The batch captured; None where that fails.

        The first time a row is captured before, in memory of its own: a capture that comes to an operation which must
        not be captured never gives its memory back, and must not have the step's. One that runs out of it does.
        """
        if self.obstacle and not self._is_rehearsed:
            return None
        torch.cuda.synchronize()  # what is still under way is no part of this
        try:
            with self._stopwatch.phase("compile"):
                if not self._is_rehearsed:
                    _CapturedBatch(model, batch.first_rows(model.pack.num_members), None)
                    self._is_rehearsed = True
                return _CapturedBatch(model, batch, self._step)
        except RuntimeError as error:
            _recover_from_failed_capture()
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
    """The context within which what this thread launches is captured; NCCL's threads may look at its events meanwhile.

    after: the graph whose memory it uses again, for the two are never replayed at the same time.
    """
    pool = None if after is None else after.pool()
    # After a capture that failed torch would stay on the stream of the capture.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, stream=_capture_stream(), capture_error_mode="thread_local"),
    ):
        yield


def _recover_from_failed_capture() -> None:
    """Let the device's random generator draw again: it believes to be captured until a capture succeeds.

    LoraGrid's own draws have generators of their own: where this fails too, training goes on all the same.
    """
    torch.cuda.synchronize()
    with suppress(RuntimeError), _capture(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


@cache
def _capture_stream() -> torch.cuda.Stream:
    """One for the whole process: every stream keeps a cuBLAS workspace and an allocator's pool of its own for ever."""
    return torch.cuda.Stream()


def fuse_pieces(model: PackModel) -> None:
    """Compile what is one long row of elementwise kernels otherwise, in seconds: softmax with its gradient, AdamW."""
    _allow_recompilations()
    model.score_rows = torch.compile(fusible_score_rows, dynamic=False)
    # Blocks of all sizes share one compilation.
    model.optimizer.update = torch.compile(adamw_update, dynamic=True)


def compile_layers(base: PreTrainedModel) -> None:
    """Compile every decoder layer by itself: layers of equal shapes share one compilation.

    The compiler may compute elementwise results again in backward even where a matrix product reads them there: of the
    saved activations a third goes (LoRA, bytes per token and layer: 79,648 to 52,600) for about 1 % of the time.
    """
    _allow_recompilations()
    torch._functorch.config.ban_recompute_materialized_backward = False
    for layer in decoder_layers(base):
        layer.compile(dynamic=False)


def uncompile_layers(base: PreTrainedModel) -> None:
    """Let every decoder layer run kernel by kernel again."""
    for layer in decoder_layers(base):
        layer._compiled_call_impl = None  # what `Module.compile` sets, and has no opposite for


def _allow_recompilations() -> None:
    """One per kind of adapter set and per shape; beyond its limit torch would run eagerly without a word."""
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
