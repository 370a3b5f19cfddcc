"""The frozen weight of a layer behind a small interface, which hides how the layer stores it (transposed, sharded)."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.targets import is_conv1d

# Rows of a weight that are converted to float64 at a time.
ROWS_AT_ONCE = 1024


class BaseWeight(ABC):
    """The weight W (d_out, d_in) of a frozen linear layer, however the layer stores it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The weight's device."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The layer's bias (d_out,), if any; only valid inside the layer's forward."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole weight W (d_out, d_in).

        With a sharded base, a call outside the layer's forward gathers the weight, so all workers must make it.
        """

    def row_norms(self) -> Tensor:
        """||W_i|| of every row, (d_out,) in float64."""
        pieces = self.dense().detach().split(ROWS_AT_ONCE)
        return torch.cat([torch.linalg.vector_norm(piece.double(), dim=1) for piece in pieces])

    def product(self, factors: Tensor) -> Tensor:
        """The product F W^T of small factors with the weight, in the dtype of F: (.., r, d_in) -> (.., r, d_out)."""
        return factors @ self.dense().to(factors.dtype).mT


class LayerWeight(BaseWeight):
    """The weight of an `nn.Linear`, or of transformers' `Conv1D`, which stores it (d_in, d_out).

    In a base that FSDP2 shards, the layer holds the whole weight inside its own forward, and a share of it outside.
    """

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer.weight, Tensor)
        self._layer, self._transposed = layer, is_conv1d(layer)

    @property
    def _stored(self) -> Tensor:
        weight = self._layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self._stored.shape
        return (second, first) if self._transposed else (first, second)

    @property
    def dtype(self) -> torch.dtype:
        return self._stored.dtype

    @property
    def device(self) -> torch.device:
        return self._stored.device

    @property
    def bias(self) -> Tensor | None:
        bias = self._layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def dense(self) -> Tensor:
        weight = self._stored
        if type(weight) is not nn.Parameter:
            weight = _gathered(weight)
        return weight.mT if self._transposed else weight


def base_weight(layer: nn.Module) -> BaseWeight:
    """The weight of one of the layers that `adaptable_layers` lists."""
    return LayerWeight(layer)


def _gathered(weight: Tensor) -> Tensor:
    """The whole weight if this worker holds a share of it; any other weight unchanged."""
    from torch.distributed.tensor import DTensor  # takes half a second; only a sharded base needs it

    return weight.full_tensor() if isinstance(weight, DTensor) else weight
