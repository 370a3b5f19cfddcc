"""Counts the bytes that a training step keeps for backward; they must be the same in every step."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from loragrid.training.step import Batch, ComputeStep, PackModel, StepResult, SumOverWorkers
from loragrid.training.torch_internals import TorchDispatchMode, storage_id


class ActivationBytes:
    """Computes steps with `compute`; counts the bytes kept for backward in those (counted from 1) that are due.

    Batches have static shapes, so every step keeps as many bytes as the first, unless the graph has changed: a gradient
    was switched on again, activations are no longer recomputed, or another attention runs. Counting changes no bit and
    costs a call per saved tensor. If the first step contains an operator whose result's shape depends on values
    (experts that choose their tokens), nothing is compared.

    It cannot be used for captured steps, which run no Python, nor with a sharded base, whose gathered weights are not
    always in memory.
    """

    def __init__(self, compute: ComputeStep, is_due: Callable[[int], bool]) -> None:
        self._compute, self._is_due = compute, is_due
        self.counts: list[int] = []
        """Bytes of each counted step, without weights and buffers; a storage kept by several operations counts once."""
        self.is_comparable = True

    def __call__(self, model: PackModel, batch: Batch, rates: Tensor, sum_over_workers: SumOverWorkers) -> StepResult:
        """As `ComputeStep`."""
        if not self._is_due(model.completed + 1):
            return self._compute(model, batch, rates, sum_over_workers)
        counter = _Counter(model)
        with saved_tensors_hooks(counter.keep, lambda tensor: tensor):
            if self.counts:
                result = self._compute(model, batch, rates, sum_over_workers)
            else:
                with _NoteShapesOfValues() as noted:
                    result = self._compute(model, batch, rates, sum_over_workers)
                self.is_comparable = not noted.found
        self.counts.append(counter.num_bytes)
        return result

    def difference(self) -> str | None:
        """How the last counted step differs from the first; None if they are equal or cannot be compared."""
        if not self.counts or not self.is_comparable or self.counts[-1] == self.counts[0]:
            return None
        return (
            f"saved activations: a step keeps {self.counts[-1]:,} bytes for backward, the pack's first step kept "
            f"{self.counts[0]:,}"
        )


class _Counter:
    """Adds up the bytes of kept storages; each counts once while it is alive."""

    def __init__(self, model: PackModel) -> None:
        # By identity: a new storage may have the address of one that was freed.
        self._known = {storage_id(tensor) for tensor in [*model.base.parameters(), *model.base.buffers()]}
        self.num_bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage_id(tensor)
        if key not in self._known:
            self._known.add(key)
            self.num_bytes += storage.nbytes()
            weakref.finalize(storage, self._known.discard, key)
        # Not the tensor itself: an operation that saves its own output would keep itself alive.
        return tensor.detach()


class _NoteShapesOfValues(TorchDispatchMode):
    """Notes whether any operator that runs returns a result whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or _shape_follows_from_values(func, args)
        return func(*args, **(kwargs or {}))


def _shape_follows_from_values(func: Any, args: Any) -> bool:
    """Whether an operator's result has a shape that depends on values, or is a number that Python may use as a shape.

    A bool does not count: transformers reads some, such as whether positions restart within a row.
    """
    if torch.Tag.data_dependent_output in func.tags:
        return bool(args[0].dtype != torch.bool)
    if func is torch.ops.aten.index.Tensor:  # an integer index has a fixed result shape, a mask does not
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags
