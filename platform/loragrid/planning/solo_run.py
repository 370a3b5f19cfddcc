"""Measures the cost of one trial in a pack of its own for a few steps, before its shared pack is built."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedModel

from loragrid.data.dataset import TokenizedData
from loragrid.planning.flops import ModelShape, device_limit, model_flops, passes_of
from loragrid.planning.memory_parts import loss_bytes, resident_parts
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.batches import PackBatches
from loragrid.training.cuda_graphs import STEPS_BEFORE_CAPTURE
from loragrid.training.evaluate import score_in_chunks, summed_losses
from loragrid.training.meters import count_activation_bytes, peak_memory, reset_peak_memory, wait_for
from loragrid.training.step import PackModel, one_worker, train_step
from loragrid.training.step_mode import ModeChoice
from loragrid.training.step_runner import StepRunner
from loragrid.trials.trial import Trial


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
    """Metric key -> figure of the trial as the only member on this worker, with the worker's share of its batch.

    The first step is not timed, nor are the steps that `step_runner` runs before it replays a graph. Saved
    activations and the loss are those of one micro batch. Memory peaks include all resident memory; training
    steps and evaluation have a peak each. The rates of operations are missing if the operations of the base cannot be
    counted (`ModelShape.of`).

    Afterwards `base` has no adapters, also if this fails. A method that trains the base leaves it changed; then the
    caller must load it again.
    """
    batch_size = trial.training.batch_size // num_workers
    share = replace(trial, training=trial.training.model_copy(update={"batch_size": batch_size}))
    batches = build_batches([share], data, base.device)
    shape = ModelShape.of(base)
    limit = None if shape is None else device_limit(base.device, base.dtype)
    model = build_model([share], base)
    try:
        figures = _measure(model, batches, shape, num_steps, step_runner, clock)
    finally:
        model.pack.detach()  # also after a failure, because the base is used again
    if limit is None:
        return figures
    return figures | {
        "throughput/device_limit_flops_per_second": limit.flops_per_second,
        "throughput/device_limit_seconds": limit.seconds,
        "throughput/fraction_of_device_limit": figures["throughput/model_flops_per_second"] / limit.flops_per_second,
    }


def _measure(
    model: PackModel,
    batches: PackBatches,
    shape: ModelShape | None,
    num_steps: int,
    step_runner: StepRunner | None,
    clock: Callable[[], float],
) -> dict[str, float]:
    base = model.base
    figures = resident_parts(model) | _evaluation_peak(model, batches)
    first = next(batches.training(0).micro_batches(model.micro_batch_size))
    with count_activation_bytes(base) as saved:
        losses = model.losses(first)
    del losses
    figures |= {
        "memory/saved_activation_bytes": float(saved[0]),
        "memory/loss_bytes": float(loss_bytes(model, first)),
    }
    # Reset before the first step, because a captured step allocates its memory at the capture.
    reset_peak_memory(base.device)
    compute = step_runner or StepRunner(ModeChoice(mode="eager", reason="engine.mode"))
    for _ in range(1 if compute.choice.mode == "eager" else STEPS_BEFORE_CAPTURE + 1):
        model.completed = 0
        train_step(model, batches.training(0), one_worker, compute)
    seconds, tokens_per_second, flops_per_second = [], [], []
    for step in range(1, num_steps + 1):
        # The table of learning rates may have fewer steps than the measurement.
        model.completed = 0
        batch = batches.training(step)
        wait_for(base.device)
        start = clock()
        train_step(model, batch, one_worker, compute)
        wait_for(base.device)
        seconds.append(clock() - start)
        row_tokens, num_labels = batches.row_tokens(step, 0), int(batch.num_labels[0])
        tokens_per_second.append(sum(row_tokens) / seconds[-1])
        if shape is not None:
            flops_per_second.append(model_flops(shape, row_tokens, num_labels, passes_of(model.pack)) / seconds[-1])
    figures |= peak_memory(base.device)
    figures |= {
        "time/step_seconds": statistics.median(seconds),
        "throughput/tokens_per_second": statistics.median(tokens_per_second),
    }
    if flops_per_second:
        figures["throughput/model_flops_per_second"] = statistics.median(flops_per_second)
    return figures


def _evaluation_peak(model: PackModel, batches: PackBatches) -> dict[str, float]:
    """The memory peaks of one evaluation batch on a GPU, by metric key; the same for all batches of this shape.

    The batch has as many rows as can be evaluated at once. Empty on a CPU, because there the process's resident set
    still contains freed memory, and more of it than an evaluation needs.
    """
    device = model.base.device
    if device.type != "cuda":
        return {}
    reset_peak_memory(device)
    score_in_chunks(model, batches.scoring, lambda: summed_losses(model, batches, num_batches=1))
    wait_for(device)
    return {key.replace("/peak", "/eval_peak"): value for key, value in peak_memory(device).items()}
