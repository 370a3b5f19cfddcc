"""Shards the frozen base over the workers (FSDP2): each keeps some rows of every weight and gathers a layer to use it.

Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), implemented with torch.distributed.fsdp.fully_shard. The base does not
train, so no gradients are reduced or scattered. Adapters are attached after the sharding: FSDP does not know them, and
every worker keeps all of them.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from loragrid.models.activation_checkpointing import decoder_layers

LAYERS_AT_A_TIME = 2
"""Whole decoder layers in memory: one computes while the next one is gathered."""


def shard_base(base: PreTrainedModel, device: torch.device) -> None:
    """Move this worker's share of a base that all workers hold in main memory to `device`.

    It works unit by unit, so a GPU never holds more than the shares and one whole unit. All workers of the process
    group must call it. Afterwards the head's module must only be called inside `whole_head`.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP uses the current device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers, ends, root = _units(base)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for end in ends:
        # A weight that embedding and head share stays whole from the embedding until the loss reshards it.
        unit = fully_shard(end[0], mesh=mesh, reshard_after_forward=len(end) == 1)
        unit.set_unshard_in_backward(False)  # the loss computes its gradient in forward
        for other in end[1:]:  # not in the unit, because torch would wait until it is called
            other.weight = end[0].weight
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    base.to(device)  # type: ignore[arg-type]  # moves the other buffers; transformers narrows torch's signature
    # For GPT-2, torch warns about changes of hidden states in place, but nothing makes any.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def is_sharded(base: PreTrainedModel) -> bool:
    """Whether this worker holds a share of the base."""
    return isinstance(base.base_model, FSDPModule)


@contextmanager
def whole_head(base: PreTrainedModel) -> Iterator[nn.Linear]:
    """A context that provides the head with its whole weight."""
    head: nn.Linear = base.get_output_embeddings()
    end: Any = next((end for end in (head, base.get_input_embeddings()) if isinstance(end, FSDPModule)), None)
    if end is None:
        yield head
        return
    end.unshard()
    head.weight = end.weight
    try:
        yield head
    finally:
        end.reshard()
        head.weight = end.weight


def share_bytes(base: PreTrainedModel, num_workers: int) -> int:
    """The bytes of the base in one worker: its rows of every weight, rounded up, and whole buffers."""
    shares = sum(
        math.ceil(parameter.shape[0] / num_workers) * parameter[0].numel() * parameter.element_size()
        for parameter in base.parameters()
    )
    return shares + sum(buffer.untyped_storage().nbytes() for buffer in base.buffers())


def gathered_bytes(base: PreTrainedModel) -> int:
    """The most bytes that a worker gathers at once in a step: layers, embeddings or head, and the root's weights.

    A head with its own weight is gathered after the layers; a tied head is whole before, during and after them.
    """
    layers, ends, root = _units(base)
    seen: set[nn.Parameter] = set()
    passing = LAYERS_AT_A_TIME * max((_bytes_of([layer], seen) for layer in layers), default=0)
    *_, head = [_bytes_of(end, seen) for end in ends]
    around = _bytes_of([root], seen)
    return around + (passing + head if len(ends) == 1 else max(passing, head))


def _units(base: PreTrainedModel) -> tuple[list[nn.Module], list[list[nn.Module]], nn.Module]:
    """The units of sharding, each gathered as a whole: (decoder layers, inner ones first; ends; root with the rest).

    The ends are [[embeddings, head]] if these share one weight, else [[embeddings], [head]].
    """
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = embeddings.weight is head.weight
    ends: list[list[nn.Module]] = [[embeddings, head]] if tied else [[embeddings], [head]]
    return list(decoder_layers(base))[::-1], ends, base.base_model


def _bytes_of(modules: Sequence[nn.Module], seen: set[nn.Parameter]) -> int:
    """The bytes of the modules' parameters that are not in `seen`; adds them to it."""
    parameters: Iterable[nn.Parameter] = {parameter for module in modules for parameter in module.parameters()}
    new = set(parameters) - seen
    seen |= new
    return sum(parameter.numel() * parameter.element_size() for parameter in new)
