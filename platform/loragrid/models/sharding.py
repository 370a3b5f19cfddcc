"""Shards the frozen base over the workers (FSDP2): each keeps its rows of every weight, and gathers a layer to use it.

Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), by torch.distributed.fsdp.fully_shard. Nothing of the base trains, so
nothing is reduced or scattered. Adapters are attached after the sharding: FSDP does not know them, and every worker
keeps the whole of them.
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

# Of the decoder layers one computes while the next is on its way.
LAYERS_AT_A_TIME = 2


def shard_base(base: PreTrainedModel, device: torch.device) -> None:
    """Leave this worker its share of a base that all workers hold in main memory, on `device`.

    Unit by unit: what a GPU holds is never more than the shares and one whole unit. All workers must call it, in a
    process group of their own. The head's module must not be called from then on (`whole_head`).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP takes the current one
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers, ends, root = _units(base)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for end in ends:
        # A weight that is both ends stays whole from the embedding to the loss, which reshards it.
        unit = fully_shard(end[0], mesh=mesh, reshard_after_forward=len(end) == 1)
        unit.set_unshard_in_backward(False)  # the loss has taken its gradient in forward
        for other in end[1:]:  # not part of the unit: torch would wait for it to be called
            other.weight = end[0].weight
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    base.to(device)  # type: ignore[arg-type]  # buffers of modules around these; transformers narrows torch's signature
    # Of GPT-2: nothing changes hidden states in place, which is what it warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def is_sharded(base: PreTrainedModel) -> bool:
    """Whether this worker holds a share of the base."""
    return isinstance(base.base_model, FSDPModule)


@contextmanager
def whole_head(base: PreTrainedModel) -> Iterator[nn.Linear]:
    """The head with the whole of its weight, for as long as the context lasts."""
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
    """What one of the workers holds of the base: of every weight a part of its rows, rounded up; buffers whole."""
    shares = sum(
        math.ceil(parameter.shape[0] / num_workers) * parameter[0].numel() * parameter.element_size()
        for parameter in base.parameters()
    )
    return shares + sum(buffer.untyped_storage().nbytes() for buffer in base.buffers())


def gathered_bytes(base: PreTrainedModel) -> int:
    """The most that is whole in a worker at once in a step: layers on their way through, the ends, what is around them.

    A head of its own is gathered after the layers, one tied to the embeddings stays from before them.
    """
    layers, ends, root = _units(base)
    seen: set[nn.Parameter] = set()
    passing = LAYERS_AT_A_TIME * max((_bytes_of([layer], seen) for layer in layers), default=0)
    *_, head = [_bytes_of(end, seen) for end in ends]
    around = _bytes_of([root], seen)
    return around + (passing + head if len(ends) == 1 else max(passing, head))


def _units(base: PreTrainedModel) -> tuple[list[nn.Module], list[list[nn.Module]], nn.Module]:
    """What is gathered together: (decoder layers, inner ones first; the ends; the root with all else).

    The ends are embeddings and head, [[embeddings, head]] where they are one weight and [[embeddings], [head]] where
    they are two.
    """
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = embeddings.weight is head.weight
    ends: list[list[nn.Module]] = [[embeddings, head]] if tied else [[embeddings], [head]]
    return list(decoder_layers(base))[::-1], ends, base.base_model


def _bytes_of(modules: Sequence[nn.Module], seen: set[nn.Parameter]) -> int:
    """The bytes of the modules' parameters that are not among `seen`, where they are put."""
    parameters: Iterable[nn.Parameter] = {parameter for module in modules for parameter in module.parameters()}
    new = set(parameters) - seen
    seen |= new
    return sum(parameter.numel() * parameter.element_size() for parameter in new)
