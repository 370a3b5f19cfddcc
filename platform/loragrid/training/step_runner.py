"""Runs the steps of a pack in one of three modes: kernel by kernel, as CUDA graphs, or compiled and then as graphs."""

from dataclasses import replace

import torch
from torch import Tensor

from loragrid.training.cuda_graphs import (
    STEPS_BEFORE_CAPTURE,
    CapturedEvaluation,
    CapturedStep,
    capture_stream,
    recover_from_failed_capture,
)
from loragrid.training.meters import Stopwatch
from loragrid.training.step import Batch, PackModel, StepResult, SumOverWorkers, compute_step
from loragrid.training.step_mode import MODE_TAG, Mode, ModeChoice


class StepRunner:
    """`compute_step` in the mode of `choice`; every attached pack needs a new runner.

    A captured step is replayed on the same tensors, so all batches must have one shape. Learning rates, stop marks and
    step counts are tensors, so one capture serves the whole schedule. Everything that must not be captured (saving,
    `AdapterPack.after_step`) runs outside and uses the same tensors. Once a step is captured, evaluation is, too. If a
    capture fails, the steps run eagerly from then on, and `choice` holds the reason. `stopwatch` counts the first step,
    which compiles, and the captures as `compile`.
    """

    def __init__(self, choice: ModeChoice, stopwatch: Stopwatch | None = None) -> None:
        self.choice = choice
        self._stopwatch = stopwatch or Stopwatch()
        self._num_before = 0
        self._captured: CapturedStep | None = None
        self._evaluation: CapturedEvaluation | None = None

    @property
    def mode(self) -> Mode:
        """The mode in which steps run now."""
        return self.choice.mode

    def __call__(self, model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
        """As `compute_step`."""
        if self.choice.mode == "eager":
            return compute_step(model, batch, rates, sum_over_workers)
        if self._captured is None and self._num_before < STEPS_BEFORE_CAPTURE:
            return self._before_capture(model, batch, rates, sum_over_workers)
        if self._captured is None:
            self._captured = self._try_to_capture(model, batch, rates)
        if self._captured is None:
            return compute_step(model, batch, rates, sum_over_workers)
        return self._captured.replay(batch, rates, sum_over_workers)

    def tags(self) -> dict[str, str]:
        """How the steps are run, as MLflow tags."""
        tags = {MODE_TAG: self.choice.mode, f"{MODE_TAG}.reason": self.choice.reason}
        if self.choice.attention:
            tags[f"{MODE_TAG}.attention"] = self.choice.attention
        if self._evaluation is not None and self._evaluation.obstacle:
            tags[f"{MODE_TAG}.evaluation"] = f"eager: {self._evaluation.obstacle}"
        return tags

    def _before_capture(
        self, model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers
    ) -> StepResult:
        """One of the steps that run before the capture; the first also waits for what it compiles, and times it."""
        self._num_before += 1
        if self._num_before > 1:
            return _compute_on_capture_stream(model, batch, rates, sum_over_workers)
        torch.cuda.synchronize()
        with self._stopwatch.phase("compile"):
            result = _compute_on_capture_stream(model, batch, rates, sum_over_workers)
            torch.cuda.synchronize()
        return result

    def _try_to_capture(self, model: PackModel, batch: Batch, rates: Tensor) -> CapturedStep | None:
        """The captured step; if the capture fails, None, and `choice` becomes eager.

        Raises:
            torch.OutOfMemoryError: memory ran out; a smaller pack may still be captured.
        """
        try:
            torch.cuda.synchronize()
            with self._stopwatch.phase("compile"):
                captured = CapturedStep(model, batch, rates)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            recover_from_failed_capture()
            reason = f"the step could not be captured: {str(error).splitlines()[0]}"
            self.choice = replace(self.choice, mode="eager", reason=reason)
            return None
        self._evaluation = CapturedEvaluation(captured.gradients, self._stopwatch)
        model.evaluate_batch = self._evaluation
        return captured


def _compute_on_capture_stream(
    model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers
) -> StepResult:
    """`compute_step` on the stream of the capture: steps before a capture must run there."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = compute_step(model, batch, rates, sum_over_workers)
    torch.cuda.current_stream().wait_stream(stream)
    return result
