"""Trains packs one after another in one worker, on one copy of the base, and keeps the members' states between them."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed
from torch import Tensor
from transformers import PreTrainedModel

from loragrid.assembly import build_batches, build_model
from loragrid.batches import PackBatches
from loragrid.config import DataConfig, EarlyStoppingConfig, ModelConfig
from loragrid.data import TokenizedData
from loragrid.early_stopping import rung_steps
from loragrid.engine_choice import EngineChoice, RequestedMode
from loragrid.export import export_member
from loragrid.failure import Failure, process_can_go_on
from loragrid.glossary import DIVERGED
from loragrid.grid import Trial
from loragrid.invariants import InvariantChecks, InvariantError
from loragrid.measurement import Stopwatch, free_device_memory, peak_memory, reset_peak_memory
from loragrid.member_state import MemberState, put_member, take_member
from loragrid.memory_estimate import MemoryEstimate
from loragrid.messages import PackUpdate, TrialEnd
from loragrid.observations import Accuracy, Forgetting
from loragrid.pack_reports import PackReports, SendUpdate
from loragrid.pack_timing import SHAPE_TAG, pack_shape
from loragrid.planning import Pack
from loragrid.row_scores import RowScores
from loragrid.scoring import score_rows_alone
from loragrid.solo import measure_solo
from loragrid.step import PackModel, SumOverWorkers, one_worker
from loragrid.task_scoring import TaskScorer, task_scorer
from loragrid.training import LoopSettings, Observation, Report, train
from loragrid.trial_store import SavedTrial, TrialStore
from loragrid.warm_base import WarmBase

NUM_REPORTS = 50
# What is left free beside an estimate: blocks that the allocator cannot use, and CUDA's own workspaces.
SPARE_PART = 0.1
# Where the experiment does not say how often, states are saved so that no more than this is lost.
SAVE_EVERY_SECONDS = 300.0


class PackTrainer:
    """`train` takes a pack's members from where they are to a step; who has not ended then is kept in `states`.

    On the way, and at the end, worker 0 saves the states in `store`, so that other workers can take over.

    `isolate_failures`: a trial that fails is a result, and the others go on; not so where other workers would wait.
    `describe`: the tags of what a trial trains on.
    """

    def __init__(
        self,
        rows_of: Callable[[ModelConfig, DataConfig], TokenizedData],
        send: SendUpdate,
        store: TrialStore,
        device: torch.device,
        *,
        engine_mode: RequestedMode = "auto",
        early_stopping: EarlyStoppingConfig | None = None,
        worker: int = 0,
        num_workers: int = 1,
        shard: bool = False,
        isolate_failures: bool = False,
        describe: Callable[[Trial, TokenizedData], Mapping[str, str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.states: dict[str, MemberState] = {}
        self._stopwatch = Stopwatch(clock)
        self.reports = PackReports(self._timed(send))
        self.isolate_failures = isolate_failures
        self._describe = describe
        self._worker, self._num_workers = worker, num_workers
        self._rows_of, self._device = rows_of, device
        self._store, self._clock = store, clock
        self._last_saved = clock()
        self._early_stopping = early_stopping
        self._warm = WarmBase(device, engine_mode, num_workers, shard=shard)
        self._figures: dict[object, dict[str, float]] = {}

    def restore(self, trial_id: str, saved: SavedTrial) -> None:
        """Take up where workers that are gone have left a trial."""
        self.states[trial_id] = saved.state
        self.reports.restore(trial_id, saved)

    def remaining(self, pack: Pack, until: int) -> Iterator[Pack]:
        """The pack's trials that have not ended and are not at step `until` yet, those at the same step together."""
        by_step: dict[int, list[Trial]] = {}
        for trial in pack.trials:
            state = self.states.get(trial.trial_id)
            completed = 0 if state is None else state.completed
            if trial.trial_id not in self.reports.ended_trials and completed < until:
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
            if (failure := self._try_to_save(trial_id, self.states[trial_id])) is not None
        }

    def load(self, pack: Pack) -> PreTrainedModel:
        """The pack's base on the device.

        Raises:
            ValueError: it cannot be loaded, or trained.
        """
        first = pack.trials[0]
        rows = self._rows_of(first.model, first.data)
        if self._warm.has(first):
            base = self._warm.load(first, rows)
            self._describe_inputs(first, rows)
            return base
        try:
            with self._stopwatch.phase("setup"):
                self.reports.phase(pack, "loading the base")
                base = self._warm.load(first, rows)
                if self._describe is not None:
                    self.reports.phase(pack, "identifying the base's weights")
                    self._describe_inputs(first, rows)
                return base
        finally:
            self.reports.add_seconds(pack, self._stopwatch.take())

    def _describe_inputs(self, trial: Trial, rows: TokenizedData) -> None:
        """Let the reports say on what the trial trains; worker 0 alone is heard."""
        if self._describe is not None and self._worker == 0:
            self.reports.environment = self._describe(trial, rows)

    def train(self, pack: Pack, until: int) -> None:
        """Train the members up to step `until`; those whose training is over then are exported and end.

        Raises whatever goes wrong; the members' states are then what they were before, and `release` frees the memory.
        The seconds of a pack's trials, phase by phase, come to the whole time in here and in `load`, up to the moment
        at which a trial's end is sent.
        """
        try:
            with self._stopwatch.phase("setup"):
                self._train(pack, until)
        finally:
            self.reports.add_seconds(pack, self._stopwatch.take())

    def _train(self, pack: Pack, until: int) -> None:
        stopwatch = self._stopwatch
        data = self._rows_of(pack.trials[0].model, pack.trials[0].data)
        length = data.train.input_ids.shape[1]
        with stopwatch.phase("measure"):
            trials = self._measure(pack, data, length)
        if not trials:
            return
        pack = replace(pack, trials=trials)
        base = self.load(pack)
        start = self.states[trials[0].trial_id].completed if trials[0].trial_id in self.states else 0
        choice = self._warm.choose_mode(trials, length, until - start)
        self.release()
        estimate = self._warm.estimate(trials, length, choice)
        if estimate is not None:
            self._make_sure_it_fits(pack, estimate)
        reset_peak_memory(self._device)
        batches = build_batches(trials, data, self._device, worker=self._worker, num_workers=self._num_workers)
        try:
            model = build_model(trials, base)
            try:
                self._train_attached(pack, until, start, model, batches, choice, estimate)
            finally:  # whatever fails: the base is used on
                model.pack.detach()
        finally:
            self._release_written_base(trials)

    def _train_attached(
        self,
        pack: Pack,
        until: int,
        start: int,
        model: PackModel,
        batches: PackBatches,
        choice: EngineChoice,
        estimate: MemoryEstimate | None,
    ) -> None:
        stopwatch, trials = self._stopwatch, pack.trials
        self._restore(model, trials)
        engine = self._warm.engine(model, trials, choice, stopwatch)
        observations, scorer = self._observations(trials[0], batches)
        tags = {} if scorer is None else scorer.tags()
        training = trials[0].training
        if self._describe is not None and start == 0 and until == training.steps:
            # Only then do the seconds of the trial's phases belong to a pack of this shape.
            shape = "halved" if self.reports.is_split(pack) else pack_shape(trials, self._num_workers)
            self.reports.environment = {**self.reports.environment, SHAPE_TAG: shape}
        checks = None
        if training.check_every != 0:
            checks = InvariantChecks(model, self._warm.sums, self._sum_over_workers())
        settings = LoopSettings(
            steps=until,
            report_every=training.report_every or max(1, training.steps // NUM_REPORTS),
            eval_every=training.eval_every,
            checkpoint_every=training.checkpoint_every,
            milestones=frozenset(rung_steps(self._early_stopping, training.steps)),
            check_every=training.check_every,
        )
        self.reports.phase(pack, "training")

        def on_report(report: Report) -> None:
            if report.finished:
                with stopwatch.phase("eval"):
                    scores = self._score(trials[0], report, model, batches)
                if scores is not None and scorer is not None:
                    with stopwatch.phase("generate"):
                        right = scorer.correct(model, batches, "test", self._sum_over_workers()).cpu()
                        scores = [own.with_correct(mine) for own, mine in zip(scores, right, strict=True)]
                self._finish(pack, report, model, engine.tags() | tags, estimate, scores)
                return
            self.reports.training(pack, report, engine.tags() | tags)
            if report.checkpoint_due or self._clock() - self._last_saved >= SAVE_EVERY_SECONDS:
                with stopwatch.phase("checkpoint"):
                    self._save_members(pack, model)

        try:
            train(
                model,
                batches,
                settings,
                on_report,
                sum_over_workers=self._sum_over_workers(),
                compute=engine,
                observations=observations,
                check=None if checks is None else lambda: self._end_spoiled(pack, model, checks.check()),
                stopwatch=stopwatch,
            )
        except InvariantError as error:
            failure = Failure.of(error)
            self.end(pack, {t.trial_id: failure.end() for t in trials if not self.reports.has_ended(t.trial_id)}, {})
            self._warm.release()  # its weights may be what has changed

    def _end_spoiled(self, pack: Pack, model: PackModel, violated: Mapping[int, str]) -> None:
        """Members in whose own tensors something is violated end here; the others do not notice."""
        for member, reason in violated.items():
            model.active[member] = False
            trial_id = pack.trials[member].trial_id
            if not self.reports.has_ended(trial_id):
                self.reports.add_seconds(pack, self._stopwatch.take())
                self.states.pop(trial_id, None)
                self.reports.ended(pack, {trial_id: TrialEnd(status="FAILED", reason=reason)}, {}, pack_goes_on=True)

    def end(self, pack: Pack, ended: Mapping[str, TrialEnd], tags: Mapping[str, str]) -> None:
        """Trials of the pack end without having finished."""
        self.reports.add_seconds(pack, self._stopwatch.take())
        for trial_id in ended:
            self.states.pop(trial_id, None)
        self.reports.ended(pack, ended, tags)

    def _timed(self, send: SendUpdate) -> SendUpdate:
        """`send`, its seconds counted where they are a pack's."""

        def timed(update: PackUpdate) -> None:
            with self._stopwatch.phase("report") if self._stopwatch.is_running else nullcontext():
                send(update)

        return timed

    def release(self) -> None:
        """Free what the pack before left behind: its modules and hooks hold each other."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def _make_sure_it_fits(self, pack: Pack, estimate: MemoryEstimate) -> None:
        """Raise torch's own error where a pack of several members will not fit; one alone is given the try."""
        needed = (estimate.total - estimate.base) * (1 + SPARE_PART)
        free = free_device_memory(self._device)
        if len(pack.trials) > 1 and needed > free:
            raise torch.OutOfMemoryError(
                f"beside the base this pack would need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
            )

    def _measure(self, pack: Pack, data: TokenizedData, length: int) -> tuple[Trial, ...]:
        """Send the solo figures of every trial, measured once for those of equal shape; the trials that could be.

        Nothing is compiled for them: a pack that will be is measured as a graph.
        """
        num_steps = pack.trials[0].training.measure_steps
        if num_steps == 0:
            return pack.trials
        same_shape: dict[object, list[Trial]] = {}
        for trial in pack.trials:
            # LoRA+ differs from LoRA in its learning rates alone: equal layers and sizes cost the same.
            shape = (trial.method.stack_key(), trial.method.peft_config().get("r"))
            training = trial.training
            settings = (training.batch_size, training.micro_batch_size, training.activation_checkpointing)
            same_shape.setdefault((trial.model, trial.data, settings, shape), []).append(trial)
        same_shape = {key: trials for key, trials in same_shape.items() if not self._are_measured(trials)}
        able = {trial.trial_id for trial in pack.trials if self.reports.is_measured(trial.trial_id)}
        for index, (key, alike) in enumerate(same_shape.items()):
            if key not in self._figures:
                self.reports.phase(pack, f"measuring {_label(alike[0])} alone ({index + 1} of {len(same_shape)})")
                measured = self._measure_one(alike[0], pack, data, length, num_steps)
                if isinstance(measured, Failure):
                    self.release()
                    self.end(pack, {trial.trial_id: measured.end() for trial in alike}, measured.tags())
                    continue
                self._figures[key] = measured
            able |= {trial.trial_id for trial in alike}
            figures = {t.trial_id: self._figures[key] for t in alike if not self.reports.is_measured(t.trial_id)}
            self.reports.figures(pack, figures)
        return tuple(trial for trial in pack.trials if trial.trial_id in able)

    def _are_measured(self, trials: Sequence[Trial]) -> bool:
        return all(self.reports.is_measured(trial.trial_id) for trial in trials)

    def _measure_one(
        self, trial: Trial, pack: Pack, data: TokenizedData, length: int, num_steps: int
    ) -> dict[str, float] | Failure:
        """The figures of the trial alone, or what went wrong."""
        base = self.load(pack)
        try:
            return measure_solo(
                trial,
                base,
                data,
                num_steps=num_steps,
                num_workers=self._num_workers,
                engine=self._warm.engine_alone(trial, length),
            )
        except Exception as error:
            if not (self.isolate_failures and process_can_go_on(error)):
                raise
            return Failure.of(error)
        finally:
            self._release_written_base((trial,))

    def _release_written_base(self, trials: tuple[Trial, ...]) -> None:
        if not all(trial.method.packable for trial in trials):
            self._warm.release()

    def _restore(self, model: PackModel, trials: tuple[Trial, ...]) -> None:
        model.pack.clock.worker = self._worker
        for member, trial in enumerate(trials):
            if trial.trial_id in self.states:
                state = self.states[trial.trial_id]
                put_member(model, member, state)
                model.completed = state.completed
        model.pack.after_load()

    def _save_members(self, pack: Pack, model: PackModel) -> None:
        """Save every member's state; one that cannot be written is that trial's failure alone."""
        self.reports.add_seconds(pack, self._stopwatch.take())
        self._last_saved = self._clock()
        if self._worker != 0:
            return
        for member, trial in enumerate(pack.trials):
            if trial.trial_id in self.reports.ended_trials:
                continue
            failure = self._try_to_save(trial.trial_id, take_member(model, member))
            if failure is not None:
                model.active[member] = False
                self.states.pop(trial.trial_id, None)
                self.reports.ended(pack, {trial.trial_id: failure.end()}, failure.tags(), pack_goes_on=True)

    def _try_to_save(self, trial_id: str, state: MemberState) -> Failure | None:
        """What goes wrong, where that can stay the trial's own."""
        try:
            if self._worker == 0:
                self._store.save(trial_id, self.reports.saved(trial_id, state))
            return None
        except OSError as error:
            if not self.isolate_failures:
                raise
            return Failure.of(error)

    def _observations(self, trial: Trial, batches: PackBatches) -> tuple[list[Observation], TaskScorer | None]:
        """What a pack of trials like this one is looked at for beside its loss; the scorer of its task, if any."""
        found: list[Observation] = []
        last_step, scorer = trial.training.steps, None
        if trial.task is not None:
            scorer = task_scorer(trial.task, trial.model, batches.data)
            found.append(Accuracy(scorer=scorer, batches=batches, last_step=last_step))
        if batches.data.forgetting is not None:
            found.append(Forgetting(batches=batches, last_step=last_step))
        return found, scorer

    def _score(self, trial: Trial, report: Report, model: PackModel, batches: PackBatches) -> list[RowScores] | None:
        """How every member does on each of the test rows; None before the last step, and where there are none."""
        rows = batches.data.test
        if report.completed < trial.training.steps or not len(rows):
            return None
        losses = score_rows_alone(model, batches, rows, self._sum_over_workers())
        return [RowScores.of(rows, own) for own in losses.cpu()]

    def _finish(
        self,
        pack: Pack,
        report: Report,
        model: PackModel,
        tags: Mapping[str, str],
        estimate: MemoryEstimate | None,
        scores: Sequence[RowScores] | None,
    ) -> None:
        """Let the members end here, adapters exported, or keep their states until the pack's next rung."""
        of_pack: dict[str, float] = {}
        if estimate is not None:
            of_pack["memory/pack_estimated_bytes"] = float(estimate.total)
        if self._device.type == "cuda":
            of_pack["memory/pack_peak_bytes"] = peak_memory(self._device)["memory/peak_allocated_bytes"]
        ended: dict[str, TrialEnd] = {}
        figures = {trial.trial_id: dict(of_pack) for trial in pack.trials}
        for member, trial in enumerate(pack.trials):
            diverged_at = report.diverged_at[member]
            if trial.trial_id in self.reports.ended_trials:
                continue
            if diverged_at is not None:
                # 0: it had, before other workers took over; its curve ends at the step before.
                step = diverged_at or self.reports.last_step(trial.trial_id) + 1
                reason = f"{DIVERGED} at step {step}"
                ended[trial.trial_id] = TrialEnd(status="FAILED", reason=reason)
            elif report.completed == trial.training.steps:
                own = scores[member] if scores is not None else None
                with self._stopwatch.phase("checkpoint"):
                    ended[trial.trial_id] = self._export(model, member, trial, own)
                if own is not None:
                    figures[trial.trial_id] |= own.figures("test")
            else:
                self.states[trial.trial_id] = take_member(model, member)
        for trial_id in ended:
            self.states.pop(trial_id, None)
        self.reports.add_seconds(pack, self._stopwatch.take())
        self.reports.finished(pack, report, tags, ended=ended, figures=figures)
        if report.completed < pack.trials[0].training.steps:
            with self._stopwatch.phase("checkpoint"):
                self._save_members(pack, model)

    def _export(self, model: PackModel, member: int, trial: Trial, scores: RowScores | None) -> TrialEnd:
        """Leave a finished trial's adapter, and its scores on the test rows, in the store."""
        if self._worker == 0:
            try:
                adapter = partial(export_member, model, member, trial.model.name)
                self._store.save_output(trial.trial_id, "adapter", adapter)
                if scores is not None:
                    self._store.save_output(trial.trial_id, "scores", partial(scores.write, "test"))
            except OSError as error:
                if not self.isolate_failures:
                    raise
                return Failure.of(error).end()
        return TrialEnd(status="FINISHED")

    def _sum_over_workers(self) -> SumOverWorkers:
        if self._num_workers == 1:
            return one_worker

        def all_reduce(tensor: Tensor) -> None:
            torch.distributed.all_reduce(tensor)

        return all_reduce


def _label(trial: Trial) -> str:
    rank = trial.method.hyperparameters().get("rank")
    return trial.method.name if rank is None else f"{trial.method.name} rank {rank}"
