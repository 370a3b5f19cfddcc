"""Trains packs one after another in one worker, on one copy of the base, and keeps the members' states between them."""

import gc
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from transformers import PreTrainedModel

from loragrid.assembly import build_batches, build_model
from loragrid.checkpoint import save_checkpoint
from loragrid.config import DataConfig, EarlyStoppingConfig, ModelConfig
from loragrid.data import TokenizedData
from loragrid.early_stopping import rung_steps
from loragrid.engine import Engine
from loragrid.engine_choice import RequestedMode
from loragrid.export import export_member
from loragrid.failure import Failure, process_can_go_on
from loragrid.grid import Trial
from loragrid.measurement import Stopwatch, free_device_memory, peak_memory, reset_peak_memory, wait_for
from loragrid.member_state import MemberState, put_member, take_member
from loragrid.memory_estimate import MemoryEstimate
from loragrid.messages import ADAPTERS, TrialEnd
from loragrid.pack_reports import PackReports, SendUpdate
from loragrid.planning import Pack
from loragrid.solo import measure_solo
from loragrid.training import LoopSettings, PackModel, Report, SumOverWorkers, one_worker, train
from loragrid.warm_base import WarmBase

NUM_REPORTS = 50
# What is left free beside an estimate: blocks that the allocator cannot use, and CUDA's own workspaces.
SPARE_PART = 0.1


class PackTrainer:
    """`train` takes a pack's members from where they are to a step; who has not ended then is kept in `states`.

    `isolate_failures`: a trial that fails is a result, and the others go on; not so where other workers would wait.
    """

    def __init__(
        self,
        rows_of: Callable[[ModelConfig, DataConfig], TokenizedData],
        send: SendUpdate,
        device: torch.device,
        *,
        engine_mode: RequestedMode = "auto",
        early_stopping: EarlyStoppingConfig | None = None,
        worker: int = 0,
        num_workers: int = 1,
        shard: bool = False,
        isolate_failures: bool = False,
    ) -> None:
        self.states: dict[str, MemberState] = {}
        self.reports = PackReports(send)
        self.isolate_failures = isolate_failures
        self._worker, self._num_workers = worker, num_workers
        self._rows_of, self._device = rows_of, device
        self._early_stopping = early_stopping
        self._warm = WarmBase(device, engine_mode, num_workers, shard=shard)
        self._figures: dict[object, dict[str, float]] = {}
        self._measured: set[str] = set()

    def load(self, pack: Pack) -> PreTrainedModel:
        """The pack's base on the device.

        Raises:
            ValueError: it cannot be loaded, or trained.
        """
        first = pack.trials[0]
        rows = self._rows_of(first.model, first.data)
        if self._warm.has(first):
            return self._warm.load(first, rows)
        self.reports.phase(pack, "loading the base")
        stopwatch = Stopwatch()
        with stopwatch.phase("setup"):
            base = self._warm.load(first, rows)
        self.reports.add_seconds(pack, stopwatch.seconds())
        return base

    def train(self, pack: Pack, until: int) -> None:
        """Train the members up to step `until`; those whose training is over then are exported and end.

        Raises whatever goes wrong; the members' states are then what they were before, and `release` frees the memory.
        """
        stopwatch = Stopwatch()
        data = self._rows_of(pack.trials[0].model, pack.trials[0].data)
        length = data.train.input_ids.shape[1]
        with stopwatch.phase("measure"):
            trials = self._measure(pack, data, length)
        if not trials:
            return
        pack = replace(pack, trials=trials)
        base = self.load(pack)
        with stopwatch.phase("setup"):
            start = self.states[trials[0].trial_id].completed if trials[0].trial_id in self.states else 0
            choice = self._warm.choose_mode(trials, length, until - start)
            self.release()
            estimate = self._warm.estimate(trials, length, choice)
            if estimate is not None:
                self._make_sure_it_fits(pack, estimate)
            reset_peak_memory(self._device)
            batches = build_batches(trials, data, self._device, worker=self._worker, num_workers=self._num_workers)
            model = build_model(trials, base)
            self._restore(model, trials)
            engine = self._warm.engine(model, trials, choice)
        training = trials[0].training
        settings = LoopSettings(
            steps=until,
            report_every=training.report_every or max(1, training.steps // NUM_REPORTS),
            eval_every=training.eval_every,
            checkpoint_every=training.checkpoint_every,
            milestones=frozenset(rung_steps(self._early_stopping, training.steps)),
        )
        self.reports.phase(pack, "training")

        def on_report(report: Report) -> None:
            if report.finished:
                self.reports.add_seconds(pack, stopwatch.seconds(), report.seconds)
                self._finish(pack, report, model, engine, estimate)
            else:
                self._report(pack, report, model, engine)

        try:
            train(model, batches, settings, on_report, sum_over_workers=self._sum_over_workers(), compute=engine)
        finally:
            model.pack.detach()
            self._release_written_base(trials)

    def end(self, pack: Pack, ended: Mapping[str, TrialEnd], tags: Mapping[str, str]) -> None:
        """Trials of the pack end without having finished."""
        for trial_id in ended:
            self.states.pop(trial_id, None)
        self.reports.ended(pack, ended, tags)

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
            settings = (trial.training.batch_size, trial.training.activation_checkpointing)
            same_shape.setdefault((trial.model, trial.data, settings, shape), []).append(trial)
        able: set[str] = set()
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
            figures = {t.trial_id: self._figures[key] for t in alike if t.trial_id not in self._measured}
            if figures:
                self.reports.figures(pack, figures)
                self._measured |= figures.keys()
        return tuple(trial for trial in pack.trials if trial.trial_id in able)

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

    def _report(self, pack: Pack, report: Report, model: PackModel, engine: Engine) -> None:
        if not report.checkpoint_due:
            self.reports.training(pack, report, engine.tags())
            return
        with tempfile.TemporaryDirectory() as name:
            states = {trial.trial_id: take_member(model, member) for member, trial in enumerate(pack.trials)}
            save_checkpoint(self.states | states, Path(name))
            self.reports.training(pack, report, engine.tags(), Path(name))

    def _finish(
        self, pack: Pack, report: Report, model: PackModel, engine: Engine, estimate: MemoryEstimate | None
    ) -> None:
        """Let the members end here, adapters exported, or keep their states until the pack's next rung."""
        wait_for(self._device)
        figures: dict[str, float] = {}
        if estimate is not None:
            figures["memory/pack_estimated_bytes"] = float(estimate.total)
        if self._device.type == "cuda":
            figures["memory/pack_peak_bytes"] = peak_memory(self._device)["memory/peak_allocated_bytes"]
        ended: dict[str, TrialEnd] = {}
        with tempfile.TemporaryDirectory() as name:
            for member, trial in enumerate(pack.trials):
                diverged_at = report.diverged_at[member]
                if diverged_at is not None:
                    reason = f"diverged: loss or gradient not finite at step {diverged_at}"
                    ended[trial.trial_id] = TrialEnd(status="FAILED", reason=reason)
                elif report.completed == trial.training.steps:
                    ended[trial.trial_id] = TrialEnd(status="FINISHED")
                    if self._worker == 0:
                        export_member(model, member, trial.model.name, Path(name) / ADAPTERS / trial.trial_id)
                else:
                    self.states[trial.trial_id] = take_member(model, member)
            for trial_id in ended:
                self.states.pop(trial_id, None)
            self.reports.finished(pack, report, engine.tags(), ended=ended, figures=figures, folder=Path(name))

    def _sum_over_workers(self) -> SumOverWorkers:
        if self._num_workers == 1:
            return one_worker

        def all_reduce(tensor: Tensor) -> None:
            torch.distributed.all_reduce(tensor)

        return all_reduce


def _label(trial: Trial) -> str:
    rank = trial.method.hyperparameters().get("rank")
    return trial.method.name if rank is None else f"{trial.method.name} rank {rank}"
