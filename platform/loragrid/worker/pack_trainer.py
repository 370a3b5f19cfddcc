"""Trains packs one after another in one worker, on one copy of the base, and keeps the members' states between them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from loragrid.config.experiment import DataConfig, EarlyStoppingConfig, EngineConfig, ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.evaluation.pack_scoring import PackScoring
from loragrid.evaluation.task_scorer import TaskScorer, task_scorer
from loragrid.planning.memory_estimate import MemoryEstimate
from loragrid.planning.timing import SHAPE_TAG
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.batches import PackBatches
from loragrid.training.failure import Failure, PackTooLargeError
from loragrid.training.invariants import InvariantChecks, InvariantError
from loragrid.training.member_state import MemberState
from loragrid.training.meters import free_memory, free_unused_memory, reset_peak_memory
from loragrid.training.step import PackModel
from loragrid.training.step_mode import EngineChoice
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import SavedTrial, TrialStore
from loragrid.worker.pack_run import PackRun
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.reporter import PackReports, SendUpdate
from loragrid.worker.resident_base import ResidentBase
from loragrid.worker.solo_figures import SoloFigures
from loragrid.worker.trial_states import OpenTrials

# What is left free beside an estimate: blocks that the allocator cannot use, and CUDA's own workspaces.
SPARE_PART = 0.1


class PackTrainer:
    """`train` takes a pack's members from where they are to a step; who has not ended then is kept in `states`.

    On the way, and at the end, worker 0 saves the states in `store`, so that other workers can take over.

    `isolate_failures`: a trial that fails is a result, and the others go on; not so where other workers would wait.
    `engine`: how steps are run; `compute_deterministically` is called beforehand where it asks for that.
    `describe`: the tags of what a trial trains on.
    """

    def __init__(
        self,
        rows_of: Callable[[ModelConfig, DataConfig], TokenizedData],
        send: SendUpdate,
        store: TrialStore,
        device: torch.device,
        *,
        engine: EngineConfig | None = None,
        early_stopping: EarlyStoppingConfig | None = None,
        worker: int = 0,
        num_workers: int = 1,
        shard: bool = False,
        isolate_failures: bool = False,
        describe: Callable[[Trial, TokenizedData], Mapping[str, str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.place = ProcessGroup(
            device=device, worker=worker, num_workers=num_workers, isolate_failures=isolate_failures
        )
        self.reports = PackReports(send, clock=clock)
        self._open_trials = OpenTrials(store, self.reports, self.place, clock=clock)
        self._rows_of, self._describe = rows_of, describe
        self._early_stopping = early_stopping
        self._resident = ResidentBase(device, engine or EngineConfig(), num_workers, shard=shard)
        self._solo = SoloFigures(self._open_trials, self._resident, self.load)
        self._scorers: dict[object, TaskScorer] = {}

    @property
    def states(self) -> Mapping[str, MemberState]:
        """Trial id -> the state of a trial that has begun and has not ended."""
        return self._open_trials.states

    def restore(self, trial_id: str, saved: SavedTrial) -> None:
        """Take up where workers that are gone have left a trial."""
        self._open_trials.restore(trial_id, saved)

    def remaining(self, pack: Pack, until: int) -> Iterator[Pack]:
        """The pack's trials that have not ended and are not at step `until` yet, those at the same step together."""
        by_step: dict[int, list[Trial]] = {}
        for trial in pack.trials:
            completed = self._completed(trial)
            if not self.reports.has_ended(trial.trial_id) and completed < until:
                by_step.setdefault(completed, []).append(trial)
        for index, trials in enumerate(by_step.values()):
            name = pack.pack_id if len(by_step) == 1 else f"{pack.pack_id}.{index}"
            yield Pack(pack_id=name, trials=tuple(trials))

    def go_on(self, best: Sequence[str], ranking: list[str], rung: int) -> dict[str, TrialEnd]:
        """Note in their states who goes on from a rung; gives the ends of trials whose states cannot be written."""
        self.reports.rank(best, ranking, rung)
        return {
            trial_id: failure.end()
            for trial_id in best
            if (failure := self._open_trials.save(trial_id, self.states[trial_id])) is not None
        }

    def load(self, pack: Pack) -> PreTrainedModel:
        """The pack's base on the device.

        Raises:
            ValueError: it cannot be loaded, or trained.
        """
        first = pack.trials[0]
        rows = self._rows_of(first.model, first.data)
        if self._resident.has(first):
            base = self._resident.load(first, rows)
            self._describe_inputs(first, rows)
            return base
        try:
            with self.reports.stopwatch.phase("setup"):
                self.reports.phase(pack, "loading the base")
                base = self._resident.load(first, rows)
                if self._describe is not None:
                    self.reports.phase(pack, "identifying the base's weights")
                    self._describe_inputs(first, rows)
                return base
        finally:
            self.reports.count_seconds(pack)

    def _describe_inputs(self, trial: Trial, rows: TokenizedData) -> None:
        """Let the reports say on what the trial trains; worker 0 alone is heard."""
        if self._describe is not None and self.place.worker == 0:
            self.reports.environment = self._describe(trial, rows)

    def train(self, pack: Pack, until: int) -> None:
        """Train the members up to step `until`; those whose training is over then are exported and end.

        Raises whatever goes wrong; the members' states are then what they were before, and `release` frees the memory.
        The seconds of a pack's trials, phase by phase, come to the whole time in here and in `load`, up to the moment
        at which a trial's end is sent.
        """
        try:
            with self.reports.stopwatch.phase("setup"):
                self._train(pack, until)
        finally:
            self.reports.count_seconds(pack)

    def _train(self, pack: Pack, until: int) -> None:
        data = self._rows_of(pack.trials[0].model, pack.trials[0].data)
        with self.reports.stopwatch.phase("measure"):
            trials = self._solo.measure(pack, data)
        if not trials:
            return
        pack = replace(pack, trials=trials)
        base = self.load(pack)
        length = data.train.input_ids.shape[1]
        choice = self._resident.choose_mode(trials, length, until - self._completed(trials[0]))
        self.release()
        estimate = self._resident.estimate(trials, data, choice, self._task_scorer(trials[0], data))
        if len(trials) > 1:  # one alone is given the try
            together = self._solo.bytes_together(trials, data) if estimate is None else estimate.total - estimate.base
            self._make_sure_it_fits(together or 0.0)  # also where nobody knows: the other workers wait to hear it
        reset_peak_memory(self.place.device)
        batches = build_batches(
            trials,
            data,
            self.place.device,
            worker=self.place.worker,
            num_workers=self.place.num_workers,
            prompts_at_once=None if estimate is None else estimate.prompts_at_once,
        )
        try:
            model = build_model(trials, base)
            try:
                run = self._run(pack, until, model, batches, choice, estimate)
                run.train(until, self._early_stopping)
            except InvariantError as error:
                self._end_violated(pack, error)
            finally:  # whatever fails: the base is used on
                model.pack.detach()
        finally:
            self._resident.release_if_written(trials)

    def _run(
        self,
        pack: Pack,
        until: int,
        model: PackModel,
        batches: PackBatches,
        choice: EngineChoice,
        estimate: MemoryEstimate | None,
    ) -> PackRun:
        """The pack, its members where their trials are, about to train."""
        first, sums = pack.trials[0], self.place.sum_over_workers
        start, training = self._completed(first), first.training
        self._open_trials.put_into(model, pack.trials)
        engine = self._resident.engine(model, pack.trials, choice, self.reports.stopwatch)
        task = self._task_scorer(first, batches.data)
        if self._describe is not None and start == 0 and until == training.steps:
            # Only then do the seconds of the trial's phases belong to a pack of this shape.
            shape = "halved" if self.reports.is_split(pack) else self._resident.shape_of(pack.trials)
            self.reports.environment = {**self.reports.environment, SHAPE_TAG: shape}
        return PackRun(
            pack=pack,
            model=model,
            batches=batches,
            engine=engine,
            scoring=PackScoring(
                batches, task, last_step=training.steps, sum_over_workers=sums, stopwatch=self.reports.stopwatch
            ),
            open_trials=self._open_trials,
            checks=None if training.check_every == 0 else InvariantChecks(model, self._resident.sums, sums),
            estimate=estimate,
        )

    def _end_violated(self, pack: Pack, error: InvariantError) -> None:
        """All of the pack end, and the base's weights may be what has changed."""
        failure = Failure.of(error)
        self.end(pack, {t.trial_id: failure.end() for t in pack.trials if not self.reports.has_ended(t.trial_id)}, {})
        self._resident.release()

    def end(self, pack: Pack, ended: Mapping[str, TrialEnd], tags: Mapping[str, str]) -> None:
        """Trials of the pack end without having finished."""
        self._open_trials.end(pack, ended, tags)

    def release(self) -> None:
        """Free what the pack before left behind."""
        free_unused_memory(self.place.device)

    def _completed(self, trial: Trial) -> int:
        """The steps that the trial has behind it."""
        return self.states[trial.trial_id].completed if trial.trial_id in self.states else 0

    def _task_scorer(self, trial: Trial, data: TokenizedData) -> TaskScorer | None:
        """The scorer of the trial's task, if it has one; what reads and checks every row is made once for all packs."""
        if trial.task is None:
            return None
        key = (trial.task, trial.model, trial.data)
        if key not in self._scorers:
            self._scorers[key] = task_scorer(trial.task, trial.model, data)
        return self._scorers[key]

    def _make_sure_it_fits(self, needed: float) -> None:
        """Raise in every worker where a pack will not fit in one of them.

        needed: bytes beside the base. Main memory that runs out raises nothing: the process is ended. Workers of one
        machine share it.
        """
        place = self.place
        own = (needed * (1 + SPARE_PART), free_memory(place.device), place.memory_number)
        of_workers = place.of_all_workers(*own)
        together = [sum(other[0] for other in of_workers if other[2] == memory) for _, _, memory in of_workers]
        worst = max(range(len(of_workers)), key=lambda worker: together[worker] - of_workers[worker][1])
        needed, free = together[worst], of_workers[worst][1]
        if needed > free:
            where = "" if place.num_workers == 1 else f" {place.where(worst)}"
            raise PackTooLargeError(
                f"beside the base this pack would need about {needed / 2**30:.1f} GiB{where}, and {free / 2**30:.1f} "
                "are free"
            )
