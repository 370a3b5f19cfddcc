"""One optimizer step of a pack: a batch in, changed weights out. It knows no method, no Ray and no MLflow."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragrid.models.logits import logit_transform
from loragrid.models.sharding import whole_head
from loragrid.training.loss import ScoreRows, labelled_hidden_states, member_losses, score_rows
from loragrid_methods.stacks.optimizer import MemberAdamW
from loragrid_methods.stacks.pack import AdapterPack


class SumOverWorkers(Protocol):
    """Sums a tensor over all workers, in place; does nothing if there is only one."""

    def __call__(self, tensor: Tensor) -> None: ...


def one_worker(tensor: Tensor) -> None:
    """`SumOverWorkers` for a single worker: does nothing."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of M members, member by member, in static shapes.

    input_ids (M * R, L); label_positions and label_targets (M * R, C), -100 for no label; num_labels (M,) float64, the
    labels of the whole step over all workers (ones for a sum instead of a mean).
    """

    input_ids: Tensor
    label_positions: Tensor
    label_targets: Tensor
    num_labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """This batch on a device."""
        return Batch(**{part.name: getattr(self, part.name).to(device) for part in fields(self)})

    def first_rows(self, num_members: int) -> "Batch":
        """A batch of only the first row of each member, whose loss is a sum."""
        rows = len(self.input_ids) // num_members
        return Batch(
            input_ids=self.input_ids[::rows],
            label_positions=self.label_positions[::rows],
            label_targets=self.label_targets[::rows],
            num_labels=self.num_labels.new_ones(num_members),
        )

    def clone(self) -> "Batch":
        """A copy in its own memory."""
        return Batch(**{part.name: getattr(self, part.name).clone() for part in fields(self)})

    def copy_(self, other: "Batch") -> None:
        """Copy the contents of a batch of the same shapes."""
        for part in fields(self):
            getattr(self, part.name).copy_(getattr(other, part.name))

    def micro_batches(self, num_rows: int | None) -> Iterator["Batch"]:
        """Parts of `num_rows` rows of every member, each with the step's `num_labels`; None: the whole batch."""
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


class EvaluateBatch(Protocol):
    """Computes `PackModel.losses` inside `PackModel.evaluating`, without gradients."""

    def __call__(self, model: "PackModel", batch: Batch) -> Tensor: ...


def evaluate_batch(model: "PackModel", batch: Batch) -> Tensor:
    """`EvaluateBatch`, run kernel by kernel."""
    return model.losses(batch)


@dataclass(kw_only=True)
class PackModel:
    """A base with a pack attached: everything a step needs except the batch."""

    base: PreTrainedModel
    pack: AdapterPack
    optimizer: MemberAdamW
    learning_rates: Tensor
    """(steps, M) float64"""
    active: Tensor
    """(M,) bool; a member that diverged is inactive and keeps its last weights"""
    completed: int = 0
    score_rows: ScoreRows = score_rows
    evaluate_batch: EvaluateBatch = evaluate_batch
    micro_batch_size: int | None = None
    """rows of each member in one forward and backward; None: all rows of the batch"""

    def losses(self, batch: Batch) -> Tensor:
        """The members' mean losses over their labels (M,); a micro batch or a worker computes its share of the mean."""
        hidden = self.base.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        with whole_head(self.base) as head:
            return self.score(hidden, batch, head)

    def score(self, hidden: Tensor, batch: Batch, head: nn.Linear) -> Tensor:
        """From the base's last hidden states (M * R, L, d) to the members' mean losses (M,)."""
        labelled = labelled_hidden_states(hidden, batch.label_positions)
        logits = logit_transform(self.base)
        return member_losses(labelled, batch.label_targets, batch.num_labels, head, self.score_rows, logits)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context with adapters in evaluation mode, in which compiled code runs uncompiled."""
        self.pack.train(False)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.pack.train(True)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Figures of one step by member, each (M,), still on the device."""

    losses: Tensor
    gradient_norms: Tensor


class ComputeStep(Protocol):
    """Computes the part of a step that has static shapes: from a batch and learning rates (M,) to changed weights."""

    def __call__(
        self, model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers
    ) -> StepResult: ...


def compute_step(model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
    """Forward, loss, backward, clipping and update of all members, without waiting for the device or reading a value.

    Micro batches go forward and backward one after another; everything else happens once, after the last of them.

    The gradient of the sum of all members' losses is, for every member, the gradient of its own loss, because rows of
    different members never meet.
    """
    losses = add_up_gradients(model, batch)
    sum_gradients_and_losses(model, losses, sum_over_workers)
    return StepResult(losses=losses, gradient_norms=update_members(model, losses, rates))


def add_up_gradients(model: PackModel, batch: Batch) -> Tensor:
    """Run forward and backward of every micro batch; return the members' losses over this worker's rows (M,).

    Each is divided by the labels of the whole step, so losses and gradients add up to those of a single pass.
    """
    model.optimizer.zero_gradients()
    clock, total = model.pack.clock, None
    for index, rows in enumerate(batch.micro_batches(model.micro_batch_size)):
        clock.micro_batch = index
        losses = model.losses(rows)
        if losses.requires_grad:
            losses.sum().backward()
        losses = losses.detach()  # frees this graph before the next one is built
        total = losses if total is None else total + losses
    clock.micro_batch = 0
    assert total is not None, "a batch has rows"
    return total


def sum_gradients_and_losses(model: PackModel, losses: Tensor, sum_over_workers: SumOverWorkers) -> None:
    """Sum over all workers, in place: the gradients of all members, which are one buffer, and the losses (M,)."""
    sum_over_workers(model.pack.gradient_buffer)
    sum_over_workers(losses)


def update_members(model: PackModel, losses: Tensor, rates: Tensor) -> Tensor:
    """Clip gradients and update members whose figures are finite; return the gradient norms before clipping (M,)."""
    norms = model.optimizer.clip_gradients()
    model.pack.before_step()
    model.active &= losses.isfinite() & norms.isfinite()
    model.optimizer.step(rates, model.active)
    return norms


def train_step(
    model: PackModel, batch: Batch, sum_over_workers: SumOverWorkers, compute: ComputeStep = compute_step
) -> StepResult:
    """Run one optimizer step of all members, and the methods' `after_step`."""
    result = compute(model, batch, model.learning_rates[model.completed], sum_over_workers)
    model.completed += 1
    model.pack.after_step(model.completed)
    return result
