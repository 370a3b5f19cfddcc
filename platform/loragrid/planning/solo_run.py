"""Measures what one trial costs in a pack of its own, in turns with trials of other shapes."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from transformers import PreTrainedModel

from loragrid.data.dataset import TokenizedData
from loragrid.models.activation_checkpointing import checkpoint_activations
from loragrid.planning.flops import ModelShape, device_limit, model_flops, passes_of
from loragrid.planning.memory_parts import loss_bytes, resident_parts
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.cpu_load import CpuLoad, worker_threads
from loragrid.training.cuda_graphs import STEPS_BEFORE_CAPTURE
from loragrid.training.evaluate import score_in_chunks, summed_losses
from loragrid.training.meters import (
    count_activation_bytes,
    free_unused_memory,
    peak_memory,
    reserved_bytes,
    reset_peak_memory,
    wait_for,
)
from loragrid.training.step import one_worker, train_step
from loragrid.training.step_mode import ModeChoice
from loragrid.training.step_runner import StepRunner
from loragrid.trials.trial import Trial

HELD_PARTS = ("memory/adapter_bytes", "memory/gradient_bytes", "memory/optimizer_bytes")
"""The parts of a trial's memory, besides the base, that it holds between its steps."""


class SoloRun:
    """One trial as the only member on this worker, with the worker's share of its batch; it takes a step when asked.

    Making one measures memory and runs the steps that are not timed: the first, and those that `step_runner` runs
    before it replays a graph. Between its steps nothing of it is attached to `base`, so that runs of other trials can
    take turns with it.

    A method that trains the base leaves it changed; then the caller must load it again, and such a run takes no turns
    with others. If making a run or a step fails, nothing stays attached.

    beside: runs that keep their tensors meanwhile. Their memory does not count in this run's peaks.
    """

    def __init__(
        self,
        trial: Trial,
        base: PreTrainedModel,
        data: TokenizedData,
        *,
        num_workers: int = 1,
        step_runner: StepRunner | None = None,
        clock: Callable[[], float] = time.perf_counter,
        beside: Sequence["SoloRun"] = (),
    ) -> None:
        self._shape = ModelShape.of(base)
        # Its matrices are large, so it is measured before other runs hold memory.
        self._limit = None if self._shape is None else device_limit(base.device, base.dtype)
        start = time.perf_counter()
        batch_size = trial.training.batch_size // num_workers
        share = replace(trial, training=trial.training.model_copy(update={"batch_size": batch_size}))
        self.trial, self.device, self._clock = trial, base.device, clock
        self._compute = step_runner or StepRunner(ModeChoice(mode="eager", reason="engine.mode"))
        self._batches = build_batches([share], data, base.device)
        self._seconds: list[float] = []
        self._cpu_seconds: list[float] = []
        self._tokens_per_second: list[float] = []
        self._flops_per_second: list[float] = []
        self._measured: dict[str, float] = {}
        reserved = reserved_bytes(base.device)
        self.model = build_model([share], base)
        try:
            self._measure_memory(beside)
        finally:
            self.model.pack.detach()  # also after a failure, because the base is used again
        self.reserved_bytes = max(0, reserved_bytes(base.device) - reserved)
        """What the device's allocator keeps for this run between its steps; 0 on a CPU."""
        self.spent_seconds = time.perf_counter() - start
        """Wall-clock seconds spent on this run so far, including building it."""

    @property
    def held_bytes(self) -> float:
        """The bytes of the tensors that this run keeps between its steps."""
        return sum(self._measured[part] for part in HELD_PARTS)

    @property
    def needed_bytes(self) -> float:
        """The most bytes beside the base that a step of this run needs, from the parts that were measured."""
        own = ("memory/saved_activation_bytes", "memory/loss_bytes")
        return self.held_bytes + sum(self._measured[part] for part in own)

    def take_step(self) -> None:
        """Run and time one step, on the next rows of the trial."""
        begun, step, base = time.perf_counter(), len(self._seconds) + 1, self.model.base
        # The table of learning rates may have fewer steps than the measurement.
        self.model.completed = 0
        batch = self._batches.training(step)
        with self._attached():
            wait_for(base.device)
            start, cpu_start = self._clock(), time.process_time()
            train_step(self.model, batch, one_worker, self._compute)
            wait_for(base.device)
            seconds, cpu_seconds = self._clock() - start, time.process_time() - cpu_start
        self._seconds.append(seconds)
        self._cpu_seconds.append(cpu_seconds)
        row_tokens, num_labels = self._batches.row_tokens(step, 0), int(batch.num_labels[0])
        self._tokens_per_second.append(sum(row_tokens) / seconds)
        if self._shape is not None:
            flops = model_flops(self._shape, row_tokens, num_labels, passes_of(self.model.pack))
            self._flops_per_second.append(flops / seconds)
        self.spent_seconds += time.perf_counter() - begun

    def figures(self) -> dict[str, float]:
        """Metric key -> figure; at least one step must have been taken.

        A time is the median of the steps, with the shortest and the longest beside it. The rates of operations are
        missing if the operations of the base cannot be counted (`ModelShape.of`).
        """
        figures = self._measured | {
            "time/step_seconds": statistics.median(self._seconds),
            "time/step_low_seconds": min(self._seconds),
            "time/step_high_seconds": max(self._seconds),
            "time/step_cpu_seconds": statistics.median(self._cpu_seconds),
            "time/measure_repeats": float(len(self._seconds)),
            "time/measure_shape_seconds": self.spent_seconds,
            "throughput/tokens_per_second": statistics.median(self._tokens_per_second),
        }
        if self._limit is None:
            return figures
        speed = statistics.median(self._flops_per_second)
        return figures | {
            "throughput/model_flops_per_second": speed,
            "throughput/device_limit_flops_per_second": self._limit.flops_per_second,
            "throughput/device_limit_seconds": self._limit.seconds,
            "throughput/fraction_of_device_limit": speed / self._limit.flops_per_second,
        }

    @contextmanager
    def _attached(self) -> Iterator[None]:
        if self._compute.mode != "eager":  # a captured step runs without the modules, and a GPU must not wait for them
            yield
            return
        checkpoint_activations(self.model.base, self.trial.training.activation_checkpointing)
        self.model.pack.attach()
        try:
            yield
        finally:
            self.model.pack.detach()

    def _measure_memory(self, beside: Sequence["SoloRun"]) -> None:
        """Measure memory, and run the steps that are not timed.

        Saved activations and the loss are those of one micro batch. Memory peaks include all resident memory except
        that of `beside`; training steps and evaluation have a peak each.
        """
        model, base = self.model, self.model.base
        checkpoint_activations(base, self.trial.training.activation_checkpointing)
        self._measured = resident_parts(model) | self._evaluation_peak()
        first = next(self._batches.training(0).micro_batches(model.micro_batch_size))
        with count_activation_bytes(base) as saved:
            losses = model.losses(first)
        del losses
        self._measured |= {
            "memory/saved_activation_bytes": float(saved[0]),
            "memory/loss_bytes": float(loss_bytes(model, first)),
        }
        free_unused_memory(base.device)  # what other runs have freed must not count in a CPU's peak
        # Reset before the first step, because a captured step allocates its memory at the capture.
        reset_peak_memory(base.device)
        for _ in range(1 if self._compute.choice.mode == "eager" else STEPS_BEFORE_CAPTURE + 1):
            model.completed = 0
            train_step(model, self._batches.training(0), one_worker, self._compute)
        wait_for(base.device)
        self._measured |= peak_memory(base.device)
        held, reserved = sum(run.held_bytes for run in beside), sum(run.reserved_bytes for run in beside)
        for key in self._measured:
            if key.endswith("peak_reserved_bytes"):
                self._measured[key] -= reserved
            elif "peak" in key:
                self._measured[key] -= held

    def _evaluation_peak(self) -> dict[str, float]:
        """The memory peaks of one evaluation batch on a GPU, by metric key; the same for all batches of this shape.

        The batch has as many rows as can be evaluated at once. Empty on a CPU, because there the process's resident set
        still contains freed memory, and more of it than an evaluation needs.
        """
        model, batches, device = self.model, self._batches, self.model.base.device
        if device.type != "cuda":
            return {}
        reset_peak_memory(device)
        score_in_chunks(model, batches.scoring, lambda: summed_losses(model, batches, num_batches=1))
        wait_for(device)
        return {key.replace("/peak", "/eval_peak"): value for key, value in peak_memory(device).items()}


def take_turns(
    runs: Sequence[SoloRun],
    num_rounds: int,
    at_failure: Callable[[SoloRun, Exception], None] | None = None,
) -> dict[str, float]:
    """Let every run take a step, then every run another, `num_rounds` times; return figures that they share.

    A load that comes and goes then slows all of them, and not only the one that is measured at that moment.
    at_failure: receives a run whose step has failed, and what it raised; the run takes no further steps. None: raise.
    The load is missing if the rounds took too short a time to measure it.
    """
    failed: list[SoloRun] = []
    with CpuLoad(worker_threads(runs[0].device)) as load:
        for _ in range(num_rounds):
            for run in runs:
                if run in failed:
                    continue
                try:
                    run.take_step()
                except Exception as error:
                    if at_failure is None:
                        raise
                    failed.append(run)
                    at_failure(run, error)
    return {} if load.value is None else {"time/measure_load": load.value}


def measure_solo(
    trial: Trial,
    base: PreTrainedModel,
    data: TokenizedData,
    *,
    num_steps: int,
    num_workers: int = 1,
    step_runner: StepRunner | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Metric key -> figure of a single trial after `num_steps` timed steps, see `SoloRun`."""
    run = SoloRun(trial, base, data, num_workers=num_workers, step_runner=step_runner, clock=clock)
    shared = take_turns([run], num_steps)
    return run.figures() | shared
