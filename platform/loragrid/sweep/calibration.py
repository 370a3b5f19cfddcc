"""Times a few real steps of each distinct pack shape on this machine, within a time budget."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from loragrid.config.experiment import DataConfig, EngineConfig, ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.formatting import count_of
from loragrid.planning.solo_run import measure_solo
from loragrid.planning.timing import PackTiming, num_evaluations
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.batches import PackBatches
from loragrid.training.cuda_graphs import BATCHES_BEFORE_CAPTURE, STEPS_BEFORE_CAPTURE
from loragrid.training.evaluate import summed_losses
from loragrid.training.meters import Stopwatch, wait_for
from loragrid.training.step import PackModel, one_worker, train_step
from loragrid.training.step_runner import StepRunner
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.resident_base import ResidentBase

NUM_STEPS = 3
"""The number of steps timed after the first ones; at least one is timed, even if no time is left."""
_NUM_FIRST_STEPS = STEPS_BEFORE_CAPTURE + 1


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
    """Pack shape -> timing in this process as the only worker; shapes for which no time was left are missing.

    The largest packs are timed first. If a pack runs out of memory, its timing holds a `problem` and no times. `say`
    receives one sentence per shape.
    """
    start = clock()
    resident = ResidentBase(device, engine, 1)
    timer = _PackTimer(resident, start + budget_seconds, clock)
    distinct = {resident.shape_of(pack.trials): pack for pack in sorted(packs, key=lambda pack: len(pack.trials))}
    found: dict[str, PackTiming] = {}
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
                # The warning is harmless: members share flat buffers, so a gradient has the buffer's strides.
                warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
                found[shape] = timer.time(pack.trials, data)
        except (torch.OutOfMemoryError, MemoryError):
            resident.release()
            found[shape] = PackTiming(source="calibrated", problem="does not fit into memory: it will be halved")
    return found


class _PackTimer:
    """Times packs on one worker; a cost that several packs share is timed once, at the first of them."""

    def __init__(self, resident: ResidentBase, deadline: float, clock: Callable[[], float]) -> None:
        self._resident, self._deadline, self._clock = resident, deadline, clock
        self._load_seconds: dict[tuple[ModelConfig, DataConfig], float] = {}
        self._measure_seconds: dict[str, float] = {}  # shape of a single trial -> its solo measurement

    def time(self, trials: Sequence[Trial], data: TokenizedData) -> PackTiming:
        """One pack's timing; at least one step is timed, even after the deadline."""
        first, resident = trials[0], self._resident
        self._load(first, data)
        measure = self._measure(trials, data)
        base = resident.load(first, data)
        start = self._clock()
        choice = resident.choose_mode(trials, data.train.input_ids.shape[1], first.training.num_steps)
        batches = build_batches(trials, data, resident.device)
        model = build_model(trials, base)
        step_runner = resident.step_runner(model, trials, choice, Stopwatch())
        wait_for(resident.device)
        setup = self._clock() - start
        try:
            startup, step = self._time_steps(
                model, batches, step_runner, 1 if choice.mode == "eager" else _NUM_FIRST_STEPS
            )
            evaluation = self._time_evaluation(trials, model, batches, is_eager=choice.mode == "eager")
        finally:
            model.pack.detach()
            resident.release_if_written(trials)
        return PackTiming(
            source="calibrated",
            mode=step_runner.mode,
            load=self._load_seconds[(first.model, first.data)],
            setup=setup,
            measure=measure,
            startup=startup,
            step=step,
            evaluation=evaluation,
        )

    def _load(self, trial: Trial, data: TokenizedData) -> None:
        if self._resident.has(trial):
            return
        start = self._clock()
        self._resident.load(trial, data)
        wait_for(self._resident.device)
        self._load_seconds.setdefault((trial.model, trial.data), self._clock() - start)

    def _measure(self, trials: Sequence[Trial], data: TokenizedData) -> float:
        """Seconds of these trials' solo measurements, one per distinct shape."""
        resident, measured = self._resident, 0.0
        for shape, trial in {resident.shape_of([trial]): trial for trial in trials}.items():
            if shape not in self._measure_seconds and trials[0].training.measure_steps:
                start = self._clock()
                base = resident.load(trial, data)
                step_runner = resident.solo_step_runner(trial, data.train.input_ids.shape[1])
                measure_solo(trial, base, data, num_steps=trial.training.measure_steps, step_runner=step_runner)
                self._measure_seconds[shape] = self._clock() - start
                resident.release_if_written([trial])
            measured += self._measure_seconds.get(shape, 0.0)
        return measured

    def _time_steps(
        self, model: PackModel, batches: PackBatches, step_runner: StepRunner, num_first: int
    ) -> tuple[float, float]:
        """(Extra seconds of the first steps compared with later ones, median seconds of a later step)."""

        def step(index: int) -> float:
            model.completed = 0  # the table of learning rates may have fewer steps
            begun = self._clock()
            train_step(model, batches.training(index), one_worker, step_runner)
            wait_for(self._resident.device)
            return self._clock() - begun

        beginning = sum(step(index) for index in range(num_first))
        seconds = [step(num_first)]
        while len(seconds) < NUM_STEPS and self._clock() < self._deadline:
            seconds.append(step(num_first + len(seconds)))
        typical = statistics.median(seconds)
        return max(0.0, beginning - num_first * typical), typical

    def _time_evaluation(
        self, trials: Sequence[Trial], model: PackModel, batches: PackBatches, *, is_eager: bool
    ) -> float:
        """Seconds of one pass over all evaluation rows, extrapolated from one batch.

        If training would capture a graph for evaluations, it is captured before the timing.
        """
        training = trials[0].training
        num_parts = len(batches.evaluation(len(trials)))
        num_all = num_parts * num_evaluations(training.num_steps, training.eval_every, len(trials))
        if not is_eager and num_all > BATCHES_BEFORE_CAPTURE:
            for _ in range(BATCHES_BEFORE_CAPTURE + 1):
                summed_losses(model, batches, num_batches=1)
            wait_for(self._resident.device)
        begun = self._clock()
        summed_losses(model, batches, num_batches=1)
        wait_for(self._resident.device)
        return (self._clock() - begun) * num_parts
