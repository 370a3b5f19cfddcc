"""The training loop: batches in, one loss curve per member out. It knows no method, no Ray and no MLflow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from loragrid.training.batches import PackBatches
from loragrid.training.evaluate import evaluate
from loragrid.training.meters import Stopwatch, wait_for
from loragrid.training.step import (
    ComputeStep,
    PackModel,
    StepResult,
    SumOverWorkers,
    compute_step,
    one_worker,
    train_step,
)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """When the loop ends, reports, evaluates and saves; all in steps. At `milestones` it evaluates and reports.

    check_every: None checks only after the loop's first and last step.
    """

    steps: int
    report_every: int
    eval_every: int | None
    checkpoint_every: int | None
    milestones: frozenset[int] = frozenset()
    check_every: int | None = None

    def is_milestone(self, step: int) -> bool:
        """Whether the loop reports and evaluates after `step` steps in any case."""
        return step == self.steps or step in self.milestones

    def evaluation_is_due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps; 0 is the bare base."""
        return step == 0 or self.is_milestone(step) or bool(self.eval_every and step % self.eval_every == 0)

    def check_is_due(self, step: int, first: int) -> bool:
        """Whether to check after `step` steps, in a loop that began after `first` steps."""
        every = bool(self.check_every and step % self.check_every == 0)
        return every or step in (first + 1, self.steps)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the loop reports, by member: the records since the last report, and the step of a divergence."""

    completed: int
    records: list[list[dict[str, float]]]
    diverged_at: list[int | None]
    checkpoint_due: bool
    finished: bool


class Observation(Protocol):
    """A measurement besides training and evaluation, whose time counts as its own phase."""

    @property
    def phase(self) -> str:
        """The stopwatch's phase to which its time is added."""

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps; 0 is the bare base."""

    def measure(self, model: PackModel, step: int, sum_over_workers: SumOverWorkers) -> Mapping[str, Tensor]:
        """Metric key -> figure of each member (M,), or of the bare base (1,). Must change nothing."""


@dataclass(kw_only=True)
class _Pending:
    """Figures that have not been reported, still on the device."""

    steps: list[tuple[int, StepResult]] = field(default_factory=list)
    evaluations: list[tuple[int, str, Tensor]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what has been reported."""
        self.steps.clear()
        self.evaluations.clear()


def train(
    model: PackModel,
    batches: PackBatches,
    settings: LoopSettings,
    report: Callable[[Report], None],
    *,
    sum_over_workers: SumOverWorkers = one_worker,
    compute: ComputeStep = compute_step,
    observations: Sequence[Observation] = (),
    check: Callable[[], object] | None = None,
    stopwatch: Stopwatch | None = None,
) -> None:
    """Train from `model.completed` to the end, calling `report` in every worker at the same steps.

    Step 0's evaluation is the bare base's loss: attaching adapters changes no output. A member whose loss or gradient
    is no longer finite keeps its last weights, gets no further records, and is reported as diverged at that step.
    `check` is called between steps, before anything of the step is evaluated, reported or saved.
    """
    loop = _Loop(
        model=model,
        batches=batches,
        settings=settings,
        report=report,
        sum_over_workers=sum_over_workers,
        compute=compute,
        observations=observations,
        check=check,
        stopwatch=stopwatch or Stopwatch(),
    )
    loop.run()


@dataclass(kw_only=True)
class _Loop:
    """The state of one call of `train`; the first fields are its arguments."""

    model: PackModel
    batches: PackBatches
    settings: LoopSettings
    report: Callable[[Report], None]
    sum_over_workers: SumOverWorkers
    compute: ComputeStep
    observations: Sequence[Observation]
    check: Callable[[], object] | None
    stopwatch: Stopwatch
    pending: _Pending = field(default_factory=_Pending)
    diverged_at: list[int | None] = field(default_factory=list)

    def run(self) -> None:
        """Evaluate the bare base if nothing is trained yet, then train step by step."""
        first = self.model.completed
        self.diverged_at = [None if alive else 0 for alive in self.model.active.tolist()]
        if first == 0:
            self.evaluate(0)
            self.observe(0)
            self.flush(checkpoint_due=False, finished=False)
        while self.model.completed < self.settings.steps:
            self.step()
            self.after_step(first)

    def step(self) -> None:
        """Fetch a batch and train one step, without waiting for its result."""
        model = self.model
        with self.stopwatch.phase("data"):
            rows = self.batches.rows(model.completed)
        self.wait()  # otherwise the copy would wait for the last step, and its time would count as `data`
        with self.stopwatch.phase("data"):
            batch = rows.to(model.active.device)
            model.pack.clock.step = model.completed
        with self.stopwatch.phase("train"):
            result = train_step(model, batch, self.sum_over_workers, self.compute)
            self.pending.steps.append((model.completed, result))

    def after_step(self, first: int) -> None:
        """Check, evaluate, observe and report, whichever is due; `first`: the steps before this loop."""
        settings, done = self.settings, self.model.completed
        finished = done == settings.steps
        if self.check is not None and settings.check_is_due(done, first):
            self.wait()
            with self.stopwatch.phase("check"):
                self.check()
        if settings.evaluation_is_due(done):
            self.wait()
            self.evaluate(done)
        self.observe(done)
        checkpoint_due = finished or bool(settings.checkpoint_every and done % settings.checkpoint_every == 0)
        if settings.is_milestone(done) or checkpoint_due or done % settings.report_every == 0:
            self.flush(checkpoint_due=checkpoint_due, finished=finished)

    def evaluate(self, step: int) -> None:
        """Compute the loss over the evaluation rows; before the first step, that of the bare base."""
        with self.stopwatch.phase("eval"):
            losses = evaluate(self.model, self.batches, self.sum_over_workers, frozen=step == 0)
            self.pending.evaluations.append((step, "eval/loss", losses))
            wait_for(self.model.active.device)

    def observe(self, step: int) -> None:
        """Let the observations that are due measure."""
        for observation in self.observations:
            if observation.is_due(step):
                self.wait()
                with self.stopwatch.phase(observation.phase):
                    found = observation.measure(self.model, step, self.sum_over_workers)
                    wait_for(self.model.active.device)
                self.pending.evaluations += [(step, key, figures) for key, figures in found.items()]

    def flush(self, *, checkpoint_due: bool, finished: bool) -> None:
        """Report the pending figures."""
        with self.stopwatch.phase("train"):  # reading the figures is where the loop waits for the device
            records = _records(self.pending, self.model.learning_rates, self.diverged_at)
        self.pending.clear()
        self.report(
            Report(
                completed=self.model.completed,
                records=records,
                diverged_at=list(self.diverged_at),
                checkpoint_due=checkpoint_due,
                finished=finished,
            )
        )

    def wait(self) -> None:
        """Wait for the device; the time counts as training."""
        with self.stopwatch.phase("train"):
            wait_for(self.model.active.device)


def _records(pending: _Pending, learning_rates: Tensor, diverged_at: list[int | None]) -> list[list[dict[str, float]]]:
    """The pending figures as records by member; sets `diverged_at` for members whose figures are no longer finite."""
    records: list[dict[int, dict[str, float]]] = [{} for _ in diverged_at]
    for step, result in pending.steps:
        rates = learning_rates[step - 1].tolist()
        for member, (loss, norm) in enumerate(zip(result.losses.tolist(), result.gradient_norms.tolist(), strict=True)):
            if diverged_at[member] is None and not (_finite(loss) and _finite(norm)):
                diverged_at[member] = step
            if diverged_at[member] is None:
                records[member][step] = {
                    "step": step,
                    "train/loss": loss,
                    "train/grad_norm": norm,
                    "train/learning_rate": rates[member],
                }
    for step, key, figures in pending.evaluations:
        for member, figure in enumerate(figures.expand(len(diverged_at)).tolist()):
            if diverged_at[member] is None and _finite(figure):
                records[member].setdefault(step, {"step": step})[key] = figure
    return [[by_step[step] for step in sorted(by_step)] for by_step in records]


def _finite(value: float) -> bool:
    return value - value == 0.0
