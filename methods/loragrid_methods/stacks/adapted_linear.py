"""A frozen linear layer shared by all members of a pack, which adds each member's update to that member's rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.base_weight import base_weight


@dataclass(frozen=True, kw_only=True)
class PlacedStack:
    """A stack and the members it serves: `start` to `start + stack.num_members` (exclusive)."""

    start: int
    stack: AdapterStack


class AdaptedLinear(nn.Module):
    """Runs `base_layer` once over the rows of all members, and adds each stack's update to its members' rows.

    The rows of x are grouped by member: x (M * rows, ..., d_in) -> (M * rows, ..., d_out).
    A stack with `needs_base_output` also receives the layer's output and weight. It returns an update like any other
    stack, so other members that share the layer keep their bits.
    """

    def __init__(self, base_layer: nn.Module, num_members: int, placements: Sequence[PlacedStack]) -> None:
        super().__init__()
        self.base_layer, self.base_weight = base_layer, base_weight(base_layer)
        self.num_members = num_members
        self.stacks = nn.ModuleList(placement.stack for placement in placements)
        self.enabled = True
        # (number of members, index of their stack or None), in order; together they cover every member once.
        self.segments: list[tuple[int, int | None]] = []
        cursor = 0
        for index, placement in enumerate(placements):
            assert placement.start >= cursor, "stacks must be placed in the order of their members"
            if placement.start > cursor:
                self.segments.append((placement.start - cursor, None))
            self.segments.append((placement.stack.num_members, index))
            cursor = placement.start + placement.stack.num_members
        if cursor < num_members:
            self.segments.append((num_members - cursor, None))

    def __getattr__(self, name: str) -> Any:
        """What only the frozen layer has, because models ask a layer for its width or for the type of its weight.

        A layer whose weight a model computes with is not adapted, see `base_layers.adaptable_layers`.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self.enabled:
            return y
        rows = x.reshape(self.num_members, -1, x.shape[-1])
        if len(self.segments) == 1:
            return y + self._update(0, rows, y, 0).view_as(y)
        updates, start = [], 0
        for (size, index), piece in zip(self.segments, rows.split([size for size, _ in self.segments]), strict=True):
            if index is None:
                updates.append(y.new_zeros(size, piece.shape[1], y.shape[-1]))
            else:
                updates.append(self._update(index, piece, y, start))
            start += size
        return y + torch.cat(updates).view_as(y)

    def _update(self, index: int, rows: Tensor, y: Tensor, start: int) -> Tensor:
        """The update of stack `index`: rows (M, T, d_in) of its members, the first being `start` -> (M, T, d_out)."""
        stack = self.stacks[index]
        assert isinstance(stack, AdapterStack)
        if stack.needs_base_output:
            base_output = y.reshape(self.num_members, -1, y.shape[-1])[start : start + len(rows)]
            return stack.forward_with_base(rows, base_output, self.base_weight)
        update: Tensor = stack(rows)
        return update
