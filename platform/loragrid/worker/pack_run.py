"""One pack, attached to its base, on its way to a step: what it reports, saves and checks, and how its members end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.evaluation.pack_scoring import PackScoring
from loragrid.evaluation.row_scores import RowScores
from loragrid.models.sharding import is_sharded
from loragrid.planning.memory_estimate import MemoryEstimate
from loragrid.training.activation_bytes import ActivationBytes
from loragrid.training.batches import PackBatches
from loragrid.training.cuda_graphs import Engine
from loragrid.training.invariants import InvariantChecks
from loragrid.training.loop import LoopSettings, Report, train
from loragrid.training.meters import peak_memory
from loragrid.training.step import PackModel
from loragrid.trials.outcome import DIVERGED, TrialEnd
from loragrid.trials.packing import Pack
from loragrid.trials.successive_halving import rung_steps
from loragrid.worker.trial_states import OpenTrials

NUM_REPORTS = 50


@dataclass(frozen=True, kw_only=True)
class PackRun:
    """A pack's trials as members of `model`; `estimate`: what it was expected to hold on a GPU at its peak."""

    pack: Pack
    model: PackModel
    batches: PackBatches
    engine: Engine
    scoring: PackScoring
    open_trials: OpenTrials
    checks: InvariantChecks | None
    estimate: MemoryEstimate | None

    def train(self, until: int, early_stopping: EarlyStoppingConfig | None) -> None:
        """Train up to step `until`; members whose training is over then are exported and end, the others are kept.

        Raises:
            InvariantError: something is violated for all members.
        """
        training, reports, first = self.pack.trials[0].training, self.open_trials.reports, self.model.completed
        settings = LoopSettings(
            steps=until,
            report_every=training.report_every or max(1, training.steps // NUM_REPORTS),
            eval_every=training.eval_every,
            checkpoint_every=training.checkpoint_every,
            milestones=frozenset(rung_steps(early_stopping, training.steps)),
            check_every=training.check_every,
        )
        saved = None
        if self.checks is not None and self.engine.choice.mode == "eager" and not is_sharded(self.model.base):
            saved = ActivationBytes(self.engine, lambda step: settings.check_is_due(step, first))
        reports.phase(self.pack, "training")
        train(
            self.model,
            self.batches,
            settings,
            self._on_report,
            sum_over_workers=self.open_trials.place.sum_over_workers,
            compute=saved or self.engine,
            observations=self.scoring.observations(),
            check=None if self.checks is None else lambda: self._check(saved),
            stopwatch=reports.stopwatch,
        )

    def _on_report(self, report: Report) -> None:
        if report.finished:
            self._finish(report, self.scoring.of_test_rows(self.model))
            return
        self.open_trials.reports.training(self.pack, report, self._tags())
        if report.checkpoint_due or self.open_trials.are_due_to_be_saved:
            self._save_members()

    def _check(self, saved: ActivationBytes | None) -> None:
        """Members in whose own tensors something is violated end here; the others do not notice."""
        assert self.checks is not None
        for member, reason in self.checks.check(saved).items():
            self.model.active[member] = False
            trial_id = self.pack.trials[member].trial_id
            if not self.open_trials.reports.has_ended(trial_id):
                ended = {trial_id: TrialEnd(status="FAILED", reason=reason)}
                self.open_trials.end(self.pack, ended, {}, pack_goes_on=True)

    def _finish(self, report: Report, scores: Sequence[RowScores] | None) -> None:
        """Let the members end here, adapters exported, or keep their states until the pack's next rung."""
        reports, of_pack = self.open_trials.reports, self._memory()
        ended: dict[str, TrialEnd] = {}
        figures = {trial.trial_id: dict(of_pack) for trial in self.pack.trials}
        for member, trial in enumerate(self.pack.trials):
            diverged_at = report.diverged_at[member]
            if reports.has_ended(trial.trial_id):
                continue
            if diverged_at is not None:
                # 0: it had, before other workers took over; its curve ends at the step before.
                step = diverged_at or reports.last_step(trial.trial_id) + 1
                reason = f"{DIVERGED} at step {step}"
                ended[trial.trial_id] = TrialEnd(status="FAILED", reason=reason)
            elif report.completed == trial.training.steps:
                own = scores[member] if scores is not None else None
                with reports.stopwatch.phase("checkpoint"):
                    ended[trial.trial_id] = self.open_trials.export(self.model, member, trial, own)
                if own is not None:
                    figures[trial.trial_id] |= own.figures("test")
            else:
                self.open_trials.keep(self.model, member, trial)
        for trial_id in ended:
            self.open_trials.states.pop(trial_id, None)
        reports.count_seconds(self.pack)
        reports.finished(self.pack, report, self._tags(), ended=ended, figures=figures)
        if report.completed < self.pack.trials[0].training.steps:
            self._save_members()

    def _save_members(self) -> None:
        with self.open_trials.reports.stopwatch.phase("checkpoint"):
            self.open_trials.save_members(self.pack, self.model)

    def _tags(self) -> Mapping[str, str]:
        return {**self.engine.tags(), **self.scoring.tags()}

    def _memory(self) -> dict[str, float]:
        """What the pack was expected to hold at its peak, and what it held, by metric key; nothing on a CPU."""
        found: dict[str, float] = {}
        if self.estimate is not None:
            found["memory/pack_estimated_bytes"] = float(self.estimate.total)
        device = self.open_trials.place.device
        if device.type == "cuda":
            found["memory/pack_peak_bytes"] = peak_memory(device)["memory/peak_allocated_bytes"]
        return found
