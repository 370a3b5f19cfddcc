"""The training loop: batches in, one loss curve per member out. It names no method and knows neither Ray nor MLflow."""

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

    check_every: None checks after the loop's first and last step alone.
    """

    steps: int
    report_every: int
    eval_every: int | None
    checkpoint_every: int | None
    milestones: frozenset[int] = frozenset()
    check_every: int | None = None

    def check_is_due(self, step: int, first: int) -> bool:
        """Whether to check after `step` steps, in a loop that began with `first` steps behind it."""
        every = bool(self.check_every and step % self.check_every == 0)
        return every or step in (first + 1, self.steps)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the loop tells its caller: the records since the last report, by member, and who is still training."""

    completed: int
    records: list[list[dict[str, float]]]
    diverged_at: list[int | None]
    checkpoint_due: bool
    finished: bool


class Observation(Protocol):
    """Something looked at beside training and evaluation; its time counts in a phase of its own."""

    @property
    def phase(self) -> str:
        """Where its time counts."""

    def is_due(self, step: int) -> bool:
        """Whether to look after `step` steps; 0 is the bare base."""

    def measure(self, model: PackModel, step: int, sum_over_workers: SumOverWorkers) -> Mapping[str, Tensor]:
        """Metric key -> figure of each member (M,), or of the bare base (1,); changes nothing."""


@dataclass(kw_only=True)
class _Pending:
    """Figures that have not been reported, still on the device."""

    steps: list[tuple[int, StepResult]] = field(default_factory=list)
    evaluations: list[tuple[int, str, Tensor]] = field(default_factory=list)


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
    first, stopwatch = model.completed, stopwatch or Stopwatch()
    device = model.active.device

    def wait() -> None:
        with stopwatch.phase("train"):
            wait_for(device)

    diverged_at: list[int | None] = [None if alive else 0 for alive in model.active.tolist()]
    pending = _Pending()

    def flush(*, checkpoint_due: bool, finished: bool) -> None:
        with stopwatch.phase("train"):  # reading the figures is where the loop waits for the device
            records = _records(pending, model.learning_rates, diverged_at)
        pending.steps.clear()
        pending.evaluations.clear()
        report(
            Report(
                completed=model.completed,
                records=records,
                diverged_at=list(diverged_at),
                checkpoint_due=checkpoint_due,
                finished=finished,
            )
        )

    def observe(step: int) -> None:
        for observation in observations:
            if observation.is_due(step):
                wait()
                with stopwatch.phase(observation.phase):
                    found = observation.measure(model, step, sum_over_workers)
                    wait_for(device)
                pending.evaluations += [(step, key, figures) for key, figures in found.items()]

    if model.completed == 0:
        with stopwatch.phase("eval"):
            base_loss = evaluate(model, batches, sum_over_workers, frozen=True)
            pending.evaluations.append((0, "eval/loss", base_loss))
            wait_for(device)
        observe(0)
        flush(checkpoint_due=False, finished=False)
    while model.completed < settings.steps:
        with stopwatch.phase("data"):
            rows = batches.rows(model.completed)
        wait()  # the copy would wait for the step before, and that is no time of the data
        with stopwatch.phase("data"):
            batch = rows.to(device)
            model.pack.clock.step = model.completed
        with stopwatch.phase("train"):
            pending.steps.append((model.completed + 1, train_step(model, batch, sum_over_workers, compute)))
        done, finished = model.completed, model.completed == settings.steps
        milestone = finished or done in settings.milestones
        if check is not None and settings.check_is_due(done, first):
            wait()
            with stopwatch.phase("check"):
                check()
        if milestone or (settings.eval_every and done % settings.eval_every == 0):
            wait()
            with stopwatch.phase("eval"):
                pending.evaluations.append((done, "eval/loss", evaluate(model, batches, sum_over_workers)))
                wait_for(device)
        observe(done)
        checkpoint_due = finished or bool(settings.checkpoint_every and done % settings.checkpoint_every == 0)
        if milestone or checkpoint_due or done % settings.report_every == 0:
            flush(checkpoint_due=checkpoint_due, finished=finished)


def _records(pending: _Pending, learning_rates: Tensor, diverged_at: list[int | None]) -> list[list[dict[str, float]]]:
    """The pending figures as records by member; notes in `diverged_at` who left the finite numbers, and when."""
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
