"""Compares the tensors that train in a pack with those that its methods declare."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from loragrid.training.step import PackModel
from loragrid.training.torch_internals import storage_id
from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.pack import AdapterPack


def base_trains(pack: AdapterPack) -> bool:
    """Whether a method of the pack declares that it writes the base."""
    return not all(method.packable for method in pack.methods)


def base_weights(base: nn.Module, attached: Sequence[nn.Module] = ()) -> dict[str, nn.Parameter]:
    """Name without adapters -> weight of the base; `attached`: the modules that are attached to it.

    Buffers are not included, because some models enlarge their rotary tables as rows get longer.
    """
    own = {id(parameter) for module in attached for parameter in module.parameters()}
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if id(parameter) not in own
    }


def set_differences(model: PackModel) -> Iterator[str]:
    """The differences between the trainable set and the declared one, each as a sentence that names the tensor.

    Only the stacks' parameters may require a gradient, and the base's weights if a method trains the base. Without
    padding, every member trains as many numbers as its method's `num_parameters` declares. The optimizer must hold
    exactly these parameters and read their gradients. No value is read, so nothing waits for the device.
    """
    yield from _wrong_gradients(model)
    yield from _wrong_counts(model)
    yield from _wrong_optimizer(model)


def _wrong_gradients(model: PackModel) -> Iterator[str]:
    trains = base_trains(model.pack)
    for name, weight in base_weights(model.base, [*model.pack.stacks()]).items():
        should_train = trains and name not in model.pack.layers.unmoved
        if weight.requires_grad != should_train:
            yield f"the base's weight {name!r} " + ("requires no gradient" if should_train else "requires a gradient")
    for layer, stack in _layers(model.pack):
        for name, tensor in stack.named_buffers():
            if tensor.requires_grad:
                yield f"the frozen tensor {_path(layer, name)!r} requires a gradient"
        for name, parameter in stack.named_parameters():
            if not parameter.requires_grad:
                yield f"{_path(layer, name)!r} should train but requires no gradient"


def _wrong_counts(model: PackModel) -> Iterator[str]:
    pack = model.pack
    num_base = sum(weight.numel() for weight in base_weights(model.base, [*pack.stacks()]).values())
    trained = [0] * pack.num_members
    for start, stacks in pack.groups:
        for stack in stacks.values():
            for name, parameter in stack.named_parameters():
                for member in range(stack.num_members):
                    trained[start + member] += _num_without_padding(stack, name, parameter, member)
    for method, found in zip(pack.methods, trained, strict=True):
        declared = method.num_parameters(pack.layers, num_base).trainable
        if found != declared:
            yield f"{method.name} trains {found} numbers and declares {declared}"


def _wrong_optimizer(model: PackModel) -> Iterator[str]:
    pack, optimizer = model.pack, model.optimizer
    blocks = {(block.start, block.name): block for block in optimizer.blocks}
    for start, stacks in pack.groups:
        for layer, stack in stacks.items():
            for name, parameter in stack.named_parameters():
                block = blocks.get((start, name))
                if block is None or not _is_within(parameter, block.weights):
                    yield f"the optimizer does not hold {_path(layer, name)!r}"
                elif parameter.grad is None or not _is_within(parameter.grad, pack.gradient_buffer):
                    yield f"the gradient of {_path(layer, name)!r} is not the one that the optimizer reads"
    num_held = sum(block.weights.numel() for block in optimizer.blocks)
    num_trained = sum(parameter.numel() for parameter in pack.trainable_parameters())
    if num_held != num_trained:
        yield f"the optimizer holds {num_held} numbers where {num_trained} train"


def _layers(pack: AdapterPack) -> Iterator[tuple[str, AdapterStack]]:
    for _, stacks in pack.groups:
        yield from stacks.items()


def _path(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _num_without_padding(stack: AdapterStack, name: str, parameter: Tensor, member: int) -> int:
    sizes = [*parameter.shape]
    if name in stack.rank_axes:
        sizes[stack.rank_axes[name]] = stack.ranks[member]
    return math.prod(sizes[1:])


def _is_within(tensor: Tensor, flat: Tensor) -> bool:
    return storage_id(tensor) == storage_id(flat)
