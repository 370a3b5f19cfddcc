"""Trains one pack after another in one worker, on one copy of the base."""

from dataclasses import dataclass, replace

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.data.dataset import TokenizedData
from loragrid.data.record import data_figures, trained_figures
from loragrid.evaluation.pack_scoring import PackScoring
from loragrid.planning.memory_estimate import MemoryEstimate
from loragrid.planning.timing import SHAPE_TAG
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.failure import Failure
from loragrid.training.invariants import InvariantChecks, InvariantError
from loragrid.training.meters import Stopwatch, free_unused_memory, reset_peak_memory
from loragrid.training.step import PackModel
from loragrid.training.step_mode import ModeChoice
from loragrid.trials.packing import Pack
from loragrid.worker.memory_check import MemoryCheck
from loragrid.worker.open_trials import OpenTrials
from loragrid.worker.pack_inputs import PackInputs
from loragrid.worker.pack_run import AttachedPack, PackRun
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.reporter import Reporter
from loragrid.worker.resident_base import ResidentBase
from loragrid.worker.solo_figures import SoloFigures


@dataclass(frozen=True, kw_only=True)
class PackTrainer:
    """Trains the trials of a pack from their current step to another; keeps the states of trials that continue.

    early_stopping: members are evaluated and reported at its rungs.
    """

    group: ProcessGroup
    inputs: PackInputs
    resident: ResidentBase
    memory: MemoryCheck
    solo: SoloFigures
    trials: OpenTrials
    reporter: Reporter
    stopwatch: Stopwatch
    early_stopping: EarlyStoppingConfig | None

    def train(self, pack: Pack, until: int) -> None:
        """Train the members up to step `until`; members whose training is then over are exported and end.

        Failures are raised. The members' states are then those from before the call, and `release` frees the memory.
        Each trial's seconds, by phase, add up to the whole time in this method and in `PackInputs.load_base`, until the
        trial's end is sent.
        """
        try:
            with self.stopwatch.phase("setup"):
                self._report_rows(pack)
                with self.stopwatch.phase("measure"):
                    trials = self.solo.measure(pack, self.group)
                if trials:
                    self._train(replace(pack, trials=trials), until)
        finally:
            self.reporter.count_seconds(pack)

    def release(self) -> None:
        """Free the memory that earlier packs left behind."""
        free_unused_memory(self.group.device)

    def _train(self, pack: Pack, until: int) -> None:
        base, data = self.inputs.load_base(pack), self.inputs.rows(pack)
        num_steps = until - self.trials.completed(pack.trials[0])
        choice = self.resident.choose_mode(pack.trials, data.train.input_ids.shape[1], num_steps)
        self.release()
        estimate = self.memory.check(pack, data, choice.mode, self.inputs.scorer(pack))
        reset_peak_memory(self.group.device)
        try:
            model = build_model(pack.trials, base)
            try:
                attached = self._attach(pack, until, model, data, choice, estimate)
                run = PackRun(attached=attached, trials=self.trials, reporter=self.reporter, stopwatch=self.stopwatch)
                run.train(until, self.early_stopping, self.group.sum_over_workers)
            except InvariantError as error:
                self._end_violated(pack, error)
            finally:  # also after a failure: the next packs use the base
                model.pack.detach()
        finally:
            self.resident.release_if_written(pack.trials)

    def _report_rows(self, pack: Pack) -> None:
        """Report what the trials of a pack that begins train on, even if it fails later."""
        begun = [trial for trial in pack.trials if self.trials.completed(trial) == 0]
        if begun:
            data = self.inputs.rows(pack)
            shared = data_figures(data)
            figures = {trial.trial_id: shared | trained_figures(data, trial.training, trial.seed) for trial in begun}
            self.reporter.figures(pack, figures)

    def _attach(
        self,
        pack: Pack,
        until: int,
        model: PackModel,
        data: TokenizedData,
        choice: ModeChoice,
        estimate: MemoryEstimate | None,
    ) -> AttachedPack:
        """The pack with its members' states loaded, ready to train."""
        training, group, sums = pack.trials[0].training, self.group, self.group.sum_over_workers
        start = self.trials.completed(pack.trials[0])
        batches = build_batches(
            pack.trials,
            data,
            group.device,
            worker=group.worker,
            num_workers=group.num_workers,
            prompts_at_once=None if estimate is None else estimate.prompts_at_once,
        )
        samples = self.inputs.samples(pack)
        if samples is not None:  # before the members' states: one of them may be the base's own weights
            with self.stopwatch.phase("generate"):
                samples.ask_base(model, batches, sums)
        self.trials.put_into(model, pack.trials)
        step_runner = self.resident.step_runner(model, pack.trials, choice, self.stopwatch)
        if self.inputs.are_described and start == 0 and until == training.num_steps:
            # Only then have the trials spent all their seconds in a pack of this shape.
            self.reporter.environment = {**self.reporter.environment, SHAPE_TAG: self._shape_of(pack)}
        return AttachedPack(
            pack=pack,
            model=model,
            batches=batches,
            step_runner=step_runner,
            scoring=PackScoring(
                batches,
                self.inputs.scorer(pack),
                last_step=training.num_steps,
                sum_over_workers=sums,
                stopwatch=self.stopwatch,
                samples=samples,
            ),
            checks=None if training.check_every == 0 else InvariantChecks(model, self.resident.sums, sums),
            estimate=estimate,
            chat_template=data.chat_template,
        )

    def _shape_of(self, pack: Pack) -> str:
        """The pack's shape, under which its timing is known; "halved" for a halved pack, whose timing is not used."""
        return "halved" if self.trials.was_split(pack) else self.resident.shape_of(pack.trials)

    def _end_violated(self, pack: Pack, error: InvariantError) -> None:
        """End all trials of the pack, and drop the base, whose weights may be what has changed."""
        failure = Failure.of(error)
        left = self.trials.without_ended(pack)
        self.trials.end(pack, {trial.trial_id: failure.end() for trial in left.trials}, {})
        self.resident.release()
