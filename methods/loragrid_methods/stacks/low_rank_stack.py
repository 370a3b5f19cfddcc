"""The usual stack: it declares a low-rank term, and the term is computed for it."""

from torch import Tensor

from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.draws import MemberDropout
from loragrid_methods.stacks.low_rank import LowRankTerm, low_rank_update


class LowRankStack(AdapterStack):
    """Adds a `LowRankTerm` to its layer. A subclass holds the tensors and declares them in `term`."""

    dropout: MemberDropout | None = None
    """Dropout of the layer's input in training; None for a method that has none."""

    def term(self) -> LowRankTerm:
        """The update as it is now. Called in every forward: nothing of the size of a factor may be computed here."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.dropout is not None and self.training:
            x = self.dropout(x, self.clock)
        return low_rank_update(x, self.term())


def rank_class(rank: int) -> int:
    """16, 64, 256, ...: the first that is at least `rank`. Members of one class share stacks.

    A stack pads its members to its largest rank. Sharing saves kernels, padding costs arithmetic and optimizer memory:
    up to 16, the width of a matrix unit's tile, padding is as good as free; a member of rank 4 must not be padded to
    another's 256.
    """
    power = 16
    while power < rank:
        power *= 4
    return power
