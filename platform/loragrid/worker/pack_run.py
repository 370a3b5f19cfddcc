"""Trains an attached pack up to a step; on the way it reports, saves and checks, and it ends members."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.evaluation.pack_scoring import PackScoring
from loragrid.evaluation.row_scores import RowScores
from loragrid.models.sharding import is_sharded
from loragrid.planning.memory_estimate import MemoryEstimate
from loragrid.training.activation_bytes import ActivationBytes
from loragrid.training.batches import PackBatches
from loragrid.training.invariants import InvariantChecks
from loragrid.training.loop import LoopSettings, Report, train
from loragrid.training.meters import Stopwatch, peak_memory
from loragrid.training.step import PackModel, SumOverWorkers
from loragrid.training.step_runner import StepRunner
from loragrid.trials.outcome import DIVERGED, TrialEnd
from loragrid.trials.packing import Pack
from loragrid.trials.successive_halving import rung_steps
from loragrid.worker.open_trials import OpenTrials
from loragrid.worker.reporter import Reporter

NUM_REPORTS = 50
"""How often a trial reports, if the experiment sets no interval."""


@dataclass(frozen=True, kw_only=True)
class AttachedPack:
    """A pack's trials as members of `model`, with the objects that train, score and check them.

    checks: None if the experiment asks for none. estimate: the pack's expected peak memory on a GPU. chat_template: the
    one that the rows were rendered with, if the experiment chose it.
    """

    pack: Pack
    model: PackModel
    batches: PackBatches
    step_runner: StepRunner
    scoring: PackScoring
    checks: InvariantChecks | None
    estimate: MemoryEstimate | None
    chat_template: str | None = None

    def tags(self) -> Mapping[str, str]:
        """How the pack is run and scored, as MLflow tags."""
        return {**self.step_runner.tags(), **self.scoring.tags()}

    def memory(self) -> dict[str, float]:
        """Metric key -> bytes: expected and actual peak on a GPU; empty on a CPU."""
        found: dict[str, float] = {}
        if self.estimate is not None:
            found["memory/pack_estimated_bytes"] = float(self.estimate.total)
        device = self.model.base.device
        if device.type == "cuda":
            found["memory/pack_peak_bytes"] = peak_memory(device)["memory/peak_allocated_bytes"]
        return found


@dataclass(frozen=True, kw_only=True)
class PackRun:
    """Trains one attached pack up to a step."""

    attached: AttachedPack
    trials: OpenTrials
    reporter: Reporter
    stopwatch: Stopwatch

    def train(self, until: int, early_stopping: EarlyStoppingConfig | None, sum_over_workers: SumOverWorkers) -> None:
        """Train up to step `until`; members whose training is over are exported and end, the others' states are kept.

        Raises:
            InvariantError: an invariant is violated for all members.
        """
        attached, model = self.attached, self.attached.model
        settings = _loop_settings(attached.pack, until, early_stopping)
        counted = None
        if attached.checks is not None and attached.step_runner.mode == "eager" and not is_sharded(model.base):
            first = model.completed
            counted = ActivationBytes(attached.step_runner, lambda step: settings.check_is_due(step, first))
        self.reporter.phase(attached.pack, "training")
        train(
            model,
            attached.batches,
            settings,
            self._on_report,
            sum_over_workers=sum_over_workers,
            compute=counted or attached.step_runner,
            observations=attached.scoring.observations(
                settings.evaluation_is_due, attached.pack.trials[0].training.forgetting_every
            ),
            check=None if attached.checks is None else lambda: self._check(counted),
            stopwatch=self.stopwatch,
        )

    def _on_report(self, report: Report) -> None:
        attached = self.attached
        if report.finished:
            self._finish(report, attached.scoring.of_test_rows(attached.model))
            return
        self.reporter.training(attached.pack, report, attached.tags())
        if report.checkpoint_due or self.trials.are_due_to_be_saved:
            self._save_members()

    def _check(self, counted: ActivationBytes | None) -> None:
        """End members with a violation that concerns no other member; the others continue unchanged."""
        attached = self.attached
        assert attached.checks is not None
        for member, reason in attached.checks.check(counted).items():
            attached.model.active[member] = False
            trial_id = attached.pack.trials[member].trial_id
            if not self.trials.has_ended(trial_id):
                ended = {trial_id: TrialEnd(status="FAILED", reason=reason)}
                self.trials.end(attached.pack, ended, {}, pack_goes_on=True)

    def _finish(self, report: Report, scores: Sequence[RowScores] | None) -> None:
        """Export and end the members whose training is over, and keep the states of the others for the next rung."""
        pack, memory = self.attached.pack, self.attached.memory()
        samples = self.attached.scoring.sample_answers(self.attached.model)
        ended: dict[str, TrialEnd] = {}
        figures = {trial.trial_id: dict(memory) for trial in pack.trials}
        for member, trial in enumerate(pack.trials):
            diverged_at = report.diverged_at[member]
            if self.trials.has_ended(trial.trial_id):
                continue
            if diverged_at is not None:
                # 0: the member diverged before these workers took over, one step after its last recorded loss.
                reason = f"{DIVERGED} at step {diverged_at or self.trials.last_step(trial.trial_id) + 1}"
                ended[trial.trial_id] = TrialEnd(status="FAILED", reason=reason)
                self.trials.note_diverged(trial)
            elif report.completed == trial.training.num_steps:
                own = scores[member] if scores is not None else None
                answers = samples[member] if samples is not None else None
                with self.stopwatch.phase("checkpoint"):
                    ended[trial.trial_id] = self.trials.export(
                        self.attached.model, member, trial, own, answers, self.attached.chat_template
                    )
                if own is not None:
                    figures[trial.trial_id] |= own.figures("test")
            else:
                self.trials.keep(self.attached.model, member, trial)
        self.trials.forget(ended)
        self.reporter.count_seconds(pack)
        self.reporter.finished(pack, report, self.attached.tags(), ended=ended, figures=figures)
        if report.completed < pack.trials[0].training.num_steps:
            self._save_members()

    def _save_members(self) -> None:
        with self.stopwatch.phase("checkpoint"):
            self.trials.save_members(self.attached.pack, self.attached.model)


def _loop_settings(pack: Pack, until: int, early_stopping: EarlyStoppingConfig | None) -> LoopSettings:
    training = pack.trials[0].training
    return LoopSettings(
        steps=until,
        report_every=training.report_every or max(1, training.num_steps // NUM_REPORTS),
        eval_every=training.eval_every,
        checkpoint_every=training.checkpoint_every,
        milestones=frozenset(rung_steps(early_stopping, training.num_steps)),
        check_every=training.check_every,
    )
