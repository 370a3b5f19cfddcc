"""Checks while a pack trains: exactly the declared tensors train, and frozen tensors keep their bits.

In addition, every step keeps as many bytes for backward as the first (`activation_bytes`).

A check reads every frozen tensor once, waits for the device once, and changes nothing: curves are bit-equal with and
without it. It runs between steps, never inside a captured one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loragrid.training.activation_bytes import ActivationBytes
from loragrid.training.step import PackModel, SumOverWorkers, one_worker
from loragrid.training.trainable_set import base_trains, base_weights, set_differences
from loragrid.trials.outcome import INVARIANT_VIOLATED

WORD_BYTES = 8
STEPS_UNTIL_ALL_MOVE = 2
"""Steps after which every trained tensor has had a gradient: in the first step LoRA's A has none, because B = 0.

A layer behind a frozen weight of zero (a block that was added to a trained model) gets its first gradient one step
after the layer in front of it, so single layers are looked at one step later.
"""

SMALLEST_TELLING_RATE = 1e-12
"""Below this learning rate, a missing gradient is no violation, because gradients may underflow to zero."""


class InvariantError(RuntimeError):
    """An invariant is violated for a whole pack; the text begins with `INVARIANT_VIOLATED` and names the tensor."""


def bit_sums(tensor: Tensor, num_rows: int = 1) -> Tensor:
    """Checksums of the tensor's bits, one for each of `num_rows` equal parts: (num_rows,) int64 on its device.

    A checksum is the sum modulo 2^64 of a part's memory, read as 64-bit words; up to seven remaining bytes form one
    more word. A change within one word always changes the sum. Changes of several words cancel out with a probability
    of 2^-64. The order of the words does not matter. A contiguous tensor that begins at a word boundary is not copied.
    """
    raw = tensor.detach().contiguous().view(num_rows, -1).view(torch.uint8)
    num_bytes = raw.shape[1]
    if num_bytes % WORD_BYTES and num_rows > 1:
        return torch.cat([bit_sums(row) for row in tensor])
    if raw.data_ptr() % WORD_BYTES:
        raw = raw.clone()
    whole = num_bytes // WORD_BYTES * WORD_BYTES
    sums = raw[:, :whole].flatten().view(torch.int64).view(num_rows, -1).sum(1)
    if whole < num_bytes:
        shifts = 8 * torch.arange(num_bytes - whole, device=raw.device)
        sums = sums + (raw[:, whole:].to(torch.int64) << shifts).sum(1)
    return sums


def base_sums(base: nn.Module, attached: Sequence[nn.Module] = ()) -> dict[str, Tensor]:
    """Name -> checksum (1,) of each weight of the base; of this worker's share if the base is sharded."""
    return {name: bit_sums(_local(weight)) for name, weight in base_weights(base, attached).items()}


@dataclass(frozen=True, kw_only=True)
class _Frozen:
    """A frozen tensor that is not a weight of the base. members: each has its own part of it; None: all share it."""

    name: str
    tensor: Tensor
    members: range | None


@dataclass(frozen=True, kw_only=True)
class _Still:
    """A trained tensor, its members, and the mask (m,) of those that never had a gradient in it."""

    what: str
    members: range
    mask: Tensor


class InvariantChecks:
    """Records the state of a pack at its start; `check` compares with it.

    `base`: the checksums of the base as it was loaded; None: they are computed now. If a method of the pack writes the
    base, the base's weights are not compared. Every worker has its own checks, all workers check at the same steps, and
    all get the same result.
    """

    def __init__(
        self, model: PackModel, base: dict[str, Tensor] | None = None, sum_over_workers: SumOverWorkers = one_worker
    ) -> None:
        self._model, self._sum_over_workers = model, sum_over_workers
        self._base_trains = base_trains(model.pack)
        self._stacks = [*model.pack.stacks()]
        self._first = model.completed
        self._telling = model.learning_rates.amax(0) >= SMALLEST_TELLING_RATE
        self._reported: set[int] = set()
        sums = {} if self._base_trains else base_sums(model.base, self._stacks)
        if base is not None and not self._base_trains:
            assert base.keys() == sums.keys(), "the base is the one whose checksums were taken"
            sums = {name: base[name] for name in sums}
        self._sums = torch.cat([*sums.values(), *self._stack_sums(), self._nothing()])

    def check(self, saved: ActivationBytes | None = None) -> dict[int, str]:
        """Compare with the start; return {member: reason} for violations confined to single members, each only once.

        `saved`: has counted the bytes that the last step kept for backward.

        Raises:
            InvariantError: something is violated for all members. All workers raise it, even if only one found it.
        """
        model = self._model
        # The trainable set first, because a reason that names a tensor is more useful than a number of bytes.
        wrong_graph = next(set_differences(model), None) or (None if saved is None else saved.difference())
        base = {} if self._base_trains else base_sums(model.base, self._stacks)
        now = torch.cat([*base.values(), *self._stack_sums(), self._nothing()])
        same_number = len(now) == len(self._sums)
        changed = (now != self._sums).double() if same_number else torch.ones_like(self._sums, dtype=torch.float64)
        still = [*self._unmoved()]
        flag = torch.full((1,), float(wrong_graph is not None), dtype=torch.float64, device=changed.device)
        found = torch.cat([changed, *[each.mask.double() for each in still], flag])
        self._sum_over_workers(found)
        *flags, graph_flag = [value != 0 for value in found.tolist()]  # the only wait for the device
        if graph_flag or (not same_number and any(flags)):
            reason = wrong_graph or "another worker found a violation of its trainable set"
            raise InvariantError(f"{INVARIANT_VIOLATED}: {reason}")
        if not any(flags):
            return {}
        labels = self._labels(base, still)
        return self._by_member([label for label, is_wrong in zip(labels, flags, strict=True) if is_wrong])

    def _labels(self, base: Iterable[str], still: Iterable[_Still]) -> list[tuple[str, int | None]]:
        """The reason for each compared value, and its member (None: all members), in order."""
        labels: list[tuple[str, int | None]] = [(f"the frozen weight {name!r} has changed", None) for name in base]
        for frozen in self._frozen():
            what = f"the frozen tensor {frozen.name!r} has changed"
            labels += [(what, member) for member in (frozen.members or [None])]
        for each in still:
            what = f"{each.what} should train but never had a gradient"
            labels += [(what, member) for member in each.members]
        return labels

    def _by_member(self, violated: Sequence[tuple[str, int | None]]) -> dict[int, str]:
        """Member -> reason, for members not yet reported.

        Raises:
            InvariantError: a violation concerns all members.
        """
        for_all = [what for what, member in violated if member is None]
        if for_all:
            more = f", and {len(for_all) - 1} more" if len(for_all) > 1 else ""
            raise InvariantError(f"{INVARIANT_VIOLATED}: {for_all[0]}{more}")
        by_member: dict[int, str] = {}
        for what, member in violated:
            if member is not None and member not in self._reported:
                by_member.setdefault(member, f"{INVARIANT_VIOLATED}: {what}")
        self._reported |= by_member.keys()
        return by_member

    def _nothing(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int64, device=self._model.active.device)

    def _frozen(self) -> Iterator[_Frozen]:
        """The stacks' frozen tensors; a tensor that several layers or members share is yielded once."""
        seen: set[int] = set()
        for start, stacks in self._model.pack.groups:
            for layer, stack in stacks.items():
                own = dict(stack.named_buffers(recurse=False))
                for name, tensor in own.items():
                    if name not in stack.written_buffers:
                        members = range(start, start + stack.num_members)
                        yield _Frozen(name=f"{layer}.{name}", tensor=tensor, members=members)
                for name, tensor in stack.named_buffers():
                    if name not in own and id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield _Frozen(name=f"{layer}.{name}", tensor=tensor, members=None)

    def _stack_sums(self) -> Iterator[Tensor]:
        for frozen in self._frozen():
            yield bit_sums(frozen.tensor, len(frozen.members) if frozen.members else 1)

    def _unmoved(self) -> Iterator[_Still]:
        """Yield every trained tensor that should have moved, with a mask of the members in which it never has.

        A tensor name comes first as a whole, over all layers, then layer by layer.
        """
        model = self._model
        steps = model.completed - self._first
        if steps < STEPS_UNTIL_ALL_MOVE:
            return
        trains = model.active & self._telling
        for block, moment in zip(model.optimizer.blocks, model.optimizer.first_moments, strict=True):
            members, active = range(block.members.start, block.members.stop), trains[block.members]
            moved = {layer: view.flatten(1).any(1) for layer, view in block.views(moment).items()}
            anywhere = torch.stack([*moved.values()]).any(0)
            yield _Still(what=repr(block.name), members=members, mask=active & ~anywhere)
            if steps > STEPS_UNTIL_ALL_MOVE and len(moved) > 1:
                for layer, here in moved.items():
                    what = repr(f"{layer}.{block.name}")
                    yield _Still(what=what, members=members, mask=active & anywhere & ~here)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
