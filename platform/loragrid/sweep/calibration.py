"""Times a few real steps of every distinct shape of pack on this machine, within a bounded time."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from loragrid.config.experiment import DataConfig, EngineConfig, ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.formatting import count_of
from loragrid.planning.solo_run import measure_solo
from loragrid.planning.timing import PackTiming, num_evaluations
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.cuda_graphs import BATCHES_BEFORE_CAPTURE, STEPS_BEFORE_CAPTURE
from loragrid.training.evaluate import summed_losses
from loragrid.training.meters import Stopwatch, wait_for
from loragrid.training.step import one_worker, train_step
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.resident_base import ResidentBase

NUM_STEPS = 3
"""Steps that are timed, after those that warm up; one is, however little time is left."""


@dataclass(kw_only=True)
class _SharedCosts:
    """Seconds that packs have in common: loading a base, by base and rows; measuring a trial alone, by its shape."""

    load: dict[tuple[ModelConfig, DataConfig], float] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)


def calibrate(
    packs: Sequence[Pack],
    rows: Mapping[tuple[ModelConfig, DataConfig], TokenizedData],
    device: torch.device,
    *,
    engine: EngineConfig,
    budget_seconds: float,
    say: Callable[[str], None] = lambda sentence: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, PackTiming]:
    """Pack shape -> its timing in this process, as one worker alone; shapes for which no time is left are missing.

    The largest packs come first. A pack that runs out of memory has a `problem` in place of a time.
    """
    start = clock()
    resident = ResidentBase(device, engine, 1)
    distinct = {resident.shape_of(pack.trials): pack for pack in sorted(packs, key=lambda pack: len(pack.trials))}
    found: dict[str, PackTiming] = {}
    costs = _SharedCosts()
    for index, (shape, pack) in enumerate(reversed(distinct.items())):
        if found and clock() - start > budget_seconds:
            say(f"no time left for {len(distinct) - index} of {count_of(len(distinct), 'shape')} of packs")
            break
        size, place = count_of(len(pack.trials), "trial"), f"{index + 1} of {count_of(len(distinct), 'shape')}"
        say(f"calibrating {pack.pack_id} ({size}; {place})")
        first = pack.trials[0]
        data = rows[(first.model, first.data)]
        try:
            with warnings.catch_warnings():
                # Members share flat buffers, so a gradient is a view with the buffer's strides: correct.
                warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
                found[shape] = _time_pack(resident, pack.trials, data, costs, start + budget_seconds, clock)
        except (torch.OutOfMemoryError, MemoryError):
            resident.release()
            found[shape] = PackTiming(source="calibrated", problem="does not fit into memory: it will be halved")
    return found


def _time_pack(
    resident: ResidentBase,
    trials: Sequence[Trial],
    data: TokenizedData,
    costs: _SharedCosts,
    deadline: float,
    clock: Callable[[], float],
) -> PackTiming:
    """One pack's timing; what packs share is timed where it is met first, and kept in `costs`."""
    first, device = trials[0], resident.device
    length = data.train.input_ids.shape[1]
    if not resident.has(first):
        start = clock()
        resident.load(first, data)
        wait_for(device)
        costs.load.setdefault((first.model, first.data), clock() - start)
    measure = 0.0
    for shape, trial in {resident.shape_of([trial]): trial for trial in trials}.items():
        if shape not in costs.alone and first.training.measure_steps:
            start = clock()
            base = resident.load(trial, data)
            step_runner = resident.solo_step_runner(trial, length)
            measure_solo(trial, base, data, num_steps=trial.training.measure_steps, step_runner=step_runner)
            costs.alone[shape] = clock() - start
            resident.release_if_written([trial])
        measure += costs.alone.get(shape, 0.0)
    base = resident.load(first, data)
    start = clock()
    choice = resident.choose_mode(trials, length, first.training.steps)
    batches = build_batches(trials, data, device)
    model = build_model(trials, base)
    step_runner = resident.step_runner(model, trials, choice, Stopwatch())
    wait_for(device)
    setup = clock() - start

    def step(index: int) -> float:
        model.completed = 0  # the table of learning rates may be shorter
        begun = clock()
        train_step(model, batches.training(index), one_worker, step_runner)
        wait_for(device)
        return clock() - begun

    try:
        num_first = 1 if choice.mode == "eager" else STEPS_BEFORE_CAPTURE + 1
        beginning = sum(step(index) for index in range(num_first))
        seconds = [step(num_first)]
        while len(seconds) < NUM_STEPS and clock() < deadline:
            seconds.append(step(num_first + len(seconds)))
        num_parts = len(batches.evaluation(len(trials)))
        num_all = num_parts * num_evaluations(first.training.steps, first.training.eval_every, len(trials))
        if choice.mode != "eager" and num_all > BATCHES_BEFORE_CAPTURE:
            for _ in range(BATCHES_BEFORE_CAPTURE + 1):
                summed_losses(model, batches, num_batches=1)
            wait_for(device)
        begun = clock()
        summed_losses(model, batches, num_batches=1)
        wait_for(device)
        evaluation = (clock() - begun) * num_parts
    finally:
        model.pack.detach()
        resident.release_if_written(trials)
    typical = statistics.median(seconds)
    return PackTiming(
        source="calibrated",
        mode=step_runner.mode,
        load=costs.load[(first.model, first.data)],
        setup=setup,
        measure=measure,
        startup=max(0.0, beginning - num_first * typical),
        step=typical,
        evaluation=evaluation,
    )
