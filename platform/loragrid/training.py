"""The training loop: batches in, one loss curve per member out. It names no method and knows neither Ray nor MLflow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragrid.loss import ScoreRows, labelled_hidden_states, member_losses, score_rows
from loragrid.measurement import Stopwatch, wait_for
from loragrid.sharding import whole_head
from loragrid_methods.engine.optimizer import MemberAdamW
from loragrid_methods.engine.pack import AdapterPack

if TYPE_CHECKING:  # a step needs torch and transformers alone, not what reads files and configurations
    from loragrid.batches import PackBatches
    from loragrid.data import TokenRows


class SumOverWorkers(Protocol):
    """Adds a tensor up over all workers, in place; does nothing when there is one."""

    def __call__(self, tensor: Tensor) -> None: ...


def one_worker(tensor: Tensor) -> None:
    """The sum over a single worker."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of M members, member by member, in static shapes.

    input_ids (M * R, L); label_positions and label_targets (M * R, C), -100 where there is no label; num_labels (M,)
    float64, the labels of the whole step over all workers (ones where sums are wanted).
    """

    input_ids: Tensor
    label_positions: Tensor
    label_targets: Tensor
    num_labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """This batch on a device."""
        return Batch(**{part.name: getattr(self, part.name).to(device) for part in fields(self)})

    def micro_batches(self, num_rows: int | None) -> Iterator["Batch"]:
        """This batch in parts of `num_rows` rows of every member, each with the step's `num_labels`; None: uncut."""
        num_members = len(self.num_labels)
        num_all_rows = len(self.input_ids) // num_members
        if num_rows is None or num_rows == num_all_rows:
            yield self
            return
        assert num_all_rows % num_rows == 0, "micro batches are of equal size"
        for start in range(0, num_all_rows, num_rows):
            part = slice(start, start + num_rows)
            input_ids, label_positions, label_targets = (
                rows.unflatten(0, (num_members, num_all_rows))[:, part].flatten(0, 1)
                for rows in (self.input_ids, self.label_positions, self.label_targets)
            )
            yield Batch(
                input_ids=input_ids,
                label_positions=label_positions,
                label_targets=label_targets,
                num_labels=self.num_labels,
            )


@dataclass(kw_only=True)
class PackModel:
    """A base with a pack attached: everything a step needs but the batch."""

    base: PreTrainedModel
    pack: AdapterPack
    optimizer: MemberAdamW
    learning_rates: Tensor
    """(steps, M) float64"""
    active: Tensor
    """(M,) bool; a member that diverged is inactive and keeps its weights from then on"""
    completed: int = 0
    score_rows: ScoreRows = score_rows
    micro_batch_size: int | None = None
    """rows of each member in one forward and backward; None: all that the batch has"""

    def losses(self, batch: Batch) -> Tensor:
        """The members' mean losses over their own labels, (M,); this batch's share where the step has several."""
        hidden = self.base.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        with whole_head(self.base) as head:
            return self.score(hidden, batch, head)

    def score(self, hidden: Tensor, batch: Batch, head: nn.Linear) -> Tensor:
        """The loss by itself: from the base's last hidden states (M * R, L, d) to the members' mean losses (M,)."""
        labelled = labelled_hidden_states(hidden, batch.label_positions)
        return member_losses(labelled, batch.label_targets, batch.num_labels, head, self.score_rows)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Per-member figures of one step, each (M,), still on the device."""

    losses: Tensor
    gradient_norms: Tensor


class ComputeStep(Protocol):
    """Runs the part of a step that has static shapes: from the batch (and learning rates (M,)) to changed weights."""

    def __call__(
        self, model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers
    ) -> StepResult: ...


def compute_step(model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
    """Forward, loss, backward, clipping and update of all members. Never waits for the device, never looks at a value.

    Micro batches go forward and backward one after another; everything else happens once, after the last of them.

    The sum of the members' losses gives every member the gradient it would have alone, because no row of one member
    meets a row of another. Losses travel with the gradients: one all-reduce per step.
    """
    pack, optimizer = model.pack, model.optimizer
    optimizer.zero_gradients()
    losses = _add_up_gradients(model, batch)
    losses = _sum_gradients_and_losses(pack.gradient_buffer, losses, sum_over_workers)
    norms = optimizer.clip_gradients()
    pack.before_step()
    model.active &= losses.isfinite() & norms.isfinite()
    optimizer.step(rates, model.active)
    return StepResult(losses=losses, gradient_norms=norms)


def train_step(
    model: PackModel, batch: Batch, sum_over_workers: SumOverWorkers, compute: ComputeStep = compute_step
) -> StepResult:
    """One optimizer step of all members and what follows it (Delta-LoRA's snapshot)."""
    result = compute(model, batch, model.learning_rates[model.completed], sum_over_workers)
    model.completed += 1
    model.pack.after_step(model.completed)
    return result


def _add_up_gradients(model: PackModel, batch: Batch) -> Tensor:
    """Forward and backward of every micro batch; the members' losses over all of them, (M,).

    Each is divided by the labels of the whole step, so that losses and gradients add up to those of a single pass.
    """
    clock, total = model.pack.clock, None
    for index, rows in enumerate(batch.micro_batches(model.micro_batch_size)):
        clock.micro_batch = index
        losses = model.losses(rows)
        if losses.requires_grad:
            losses.sum().backward()
        losses = losses.detach()  # nothing of this graph lives on beside the next
        total = losses if total is None else total + losses
    clock.micro_batch = 0
    assert total is not None, "a batch has rows"
    return total


def _sum_gradients_and_losses(gradients: Tensor, losses: Tensor, sum_over_workers: SumOverWorkers) -> Tensor:
    if sum_over_workers is one_worker:
        return losses
    together = torch.cat([gradients, losses.to(gradients.dtype)])
    sum_over_workers(together)
    gradients.copy_(together[: len(gradients)])
    return together[len(gradients) :].to(losses.dtype)


@torch.no_grad()
def evaluate(
    model: PackModel,
    batches: Sequence[Batch],
    num_labels: int,
    sum_over_workers: SumOverWorkers,
    *,
    frozen: bool = False,
) -> Tensor:
    """The mean loss over the evaluation rows, (M,); (1,) of the bare base with `frozen`.

    `batches` are this worker's share (for `frozen`: with the rows of one member), each with `num_labels` of ones, so
    that it gives sums; `num_labels` counts the labels of all workers.
    """
    device = model.active.device
    total = torch.zeros(1 if frozen else model.pack.num_members, dtype=torch.float64, device=device)
    with _evaluating(model), model.pack.disabled() if frozen else nullcontext():
        for batch in batches:
            total += model.losses(batch)
    sum_over_workers(total)
    return total / num_labels


@torch.no_grad()
def score_rows_alone(
    model: PackModel,
    batches: "PackBatches",
    rows: "TokenRows",
    sum_over_workers: SumOverWorkers,
    *,
    frozen: bool = False,
) -> Tensor:
    """The summed cross-entropy over the labels of every row, by member: (M, N) float64, the same in every worker.

    (1, N) of the bare base with `frozen`.
    """
    num_members, device = 1 if frozen else model.pack.num_members, model.active.device
    scores = torch.zeros(num_members, len(rows), dtype=torch.float64, device=device)
    with _evaluating(model), model.pack.disabled() if frozen else nullcontext():
        for start, batch in batches.by_row(rows, num_members):
            found = model.losses(batch).view(num_members, -1)
            end = min(start + found.shape[1], len(rows))
            # Past the end stands what only fills the batch.
            scores[:, start:end] = found[:, : max(end - start, 0)]
    sum_over_workers(scores)
    return scores


@contextmanager
def _evaluating(model: PackModel) -> Iterator[None]:
    """Within, the adapters are in evaluation mode. Compiled layers are compiled for training: they run uncompiled."""
    model.pack.train(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.pack.train(True)


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
    batches: "PackBatches",
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
            base_loss = evaluate(model, batches.evaluation(1), batches.num_eval_labels, sum_over_workers, frozen=True)
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
        check_due = finished or done == first + 1 or bool(settings.check_every and done % settings.check_every == 0)
        if check is not None and check_due:
            wait()
            with stopwatch.phase("check"):
                check()
        if milestone or (settings.eval_every and done % settings.eval_every == 0):
            wait()
            with stopwatch.phase("eval"):
                losses = evaluate(
                    model, batches.evaluation(model.pack.num_members), batches.num_eval_labels, sum_over_workers
                )
                pending.evaluations.append((done, "eval/loss", losses))
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
