"""The stack of most methods: a subclass declares a low-rank term, and this class computes it."""

from torch import Tensor

from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.draws import MemberDropout
from loragrid_methods.stacks.low_rank import LowRankTerm, low_rank_update


class LowRankStack(AdapterStack):
    """Adds a `LowRankTerm` to its layer. A subclass holds the tensors and declares them in `term`."""

    dropout: MemberDropout | None = None
    """Dropout of the layer's input in training; None means no dropout."""

    def term(self) -> LowRankTerm:
        """The current update. Every forward calls it, so it must not compute anything of the size of a factor."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.dropout is not None and self.training:
            x = self.dropout(x, self.clock)
        return low_rank_update(x, self.term())


def rank_class(rank: int) -> int:
    """The smallest of 16, 64, 256, ... that is at least `rank`; members of one class share stacks.

    A stack pads its members to its largest rank. Sharing saves kernels, but padding costs arithmetic and optimizer
    memory. Up to 16, the width of a matrix unit's tile, padding costs almost nothing. The classes keep a member of rank
    4 from being padded to another's 256.
    """
    power = 16
    while power < rank:
        power *= 4
    return power
