"""The members of a pack on one copy of the base: attaches their stacks, and puts parameters into flat buffers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loragrid_methods.stacks.adapted_linear import AdaptedLinear, PlacedStack
from loragrid_methods.stacks.adapter_stack import AdapterStack, DrawClock
from loragrid_methods.stacks.base_layers import BaseLayers, adaptable_layers
from loragrid_methods.stacks.contract import Method
from loragrid_methods.stacks.optimizer import ParameterBlock


def member_order(methods: Sequence[Method]) -> list[int]:
    """The indices of `methods`, reordered only to put equal stack keys side by side."""
    first_seen: dict[object, int] = {}
    for index, method in enumerate(methods):
        first_seen.setdefault(method.stack_key(), index)
    return sorted(range(len(methods)), key=lambda index: (first_seen[methods[index].stack_key()], index))


class AdapterPack:
    """Adapters of M members attached to `base`, which is frozen unless a method trains it.

    members: (method, seed) pairs, those with equal stack keys side by side (`member_order`). output_layer: the model's
    head, which is never adapted. Attaching leaves every output unchanged. `detach` restores the base's own layers.
    """

    def __init__(
        self,
        base: nn.Module,
        members: Sequence[tuple[Method, int]],
        *,
        output_layer: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.base = base
        self.methods = [method for method, _ in members]
        self.seeds = [seed for _, seed in members]
        self.layers: BaseLayers = adaptable_layers(base, output_layer)
        self.clock = DrawClock()
        if len(members) > 1:
            for method in self.methods:
                if not method.packable:
                    raise ValueError(f"{method.name} writes the base and cannot be packed with other members")
        base.requires_grad_(False)
        device = next(base.parameters()).device
        self.groups: list[tuple[int, dict[str, AdapterStack]]] = []
        for start, methods, seeds in self._runs():
            built = type(methods[0]).build_stacks(methods, seeds, self.layers, base)
            stacks = {name: stack.to(device=device, dtype=dtype) for name, stack in built.items()}
            for stack in stacks.values():
                stack.clock = self.clock
            self.groups.append((start, stacks))
        self.gradient_buffer, self.blocks = self._flatten(device, dtype)
        for stack in self.stacks():
            stack.bind()
        self.adapted: dict[str, AdaptedLinear] = {}
        self.attach()

    @property
    def num_members(self) -> int:
        """M, the number of members."""
        return len(self.methods)

    def stacks(self) -> Iterator[AdapterStack]:
        """Every stack, group by group, in the order of the model's layers."""
        for _, stacks in self.groups:
            yield from stacks.values()

    def member_stacks(self, member: int) -> tuple[dict[str, AdapterStack], int]:
        """Layer name -> stack of one member, and the member's index inside those stacks."""
        for start, stacks in self.groups:
            size = next(iter(stacks.values())).num_members if stacks else 0
            if start <= member < start + size:
                return stacks, member - start
        return {}, 0

    def before_step(self) -> None:
        """Let every stack correct its gradients."""
        for stack in self.stacks():
            stack.before_step()

    @torch.no_grad()
    def after_step(self, completed: int) -> None:
        """Tell every stack that `completed` optimizer steps are done."""
        for stack in self.stacks():
            stack.after_step(completed)

    def train(self, mode: bool = True) -> None:
        """Switch the members' dropout on or off; the base always stays in evaluation mode."""
        for stack in self.stacks():
            stack.train(mode)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the base computes as if nothing were attached, for any number of rows."""
        for layer in self.adapted.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.adapted.values():
                layer.enabled = True

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The members' trainable parameters, in the order of the stacks."""
        return [parameter for stack in self.stacks() for parameter in stack.parameters()]

    def state_tensors(self) -> dict[str, Tensor]:
        """`group.layer.tensor` -> a stack's parameter or persistent buffer; the tensors themselves, not copies."""
        return {
            f"{index}.{layer}.{name}": tensor
            for index, (_, stacks) in enumerate(self.groups)
            for layer, stack in stacks.items()
            for name, tensor in stack.state_dict().items()
        }

    @torch.no_grad()
    def after_load(self) -> None:
        """Tell every stack that saved values have been copied into `state_tensors`."""
        for stack in self.stacks():
            stack.after_load()

    def attach(self) -> None:
        """Put the stacks into the base, also again after `detach`; nothing else may be attached to it."""
        placements: dict[str, list[PlacedStack]] = {}
        for start, stacks in self.groups:
            for name, stack in stacks.items():
                if name:
                    placements.setdefault(name, []).append(PlacedStack(start=start, stack=stack))
        for name, placed in placements.items():
            self.adapted[name] = AdaptedLinear(self.base.get_submodule(name), self.num_members, placed)
            _replace(self.base, name, self.adapted[name])

    def detach(self) -> None:
        """Replace the adapted layers by the base's own."""
        for name, layer in self.adapted.items():
            _replace(self.base, name, layer.base_layer)
        self.adapted = {}

    def _runs(self) -> Iterator[tuple[int, list[Method], list[int]]]:
        """(first member, methods, seeds) of every run of members with equal stack keys."""
        keys = [method.stack_key() for method in self.methods]
        assert member_order(self.methods) == list(range(len(keys))), "order the members with member_order() first"
        start = 0
        for end in range(1, len(keys) + 1):
            if end == len(keys) or keys[end] != keys[start]:
                yield start, self.methods[start:end], self.seeds[start:end]
                start = end

    def _flatten(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[ParameterBlock]]:
        """Move all parameters into blocks (m, P), and their gradients into one buffer for a single all-reduce."""
        named: list[tuple[int, str, dict[str, nn.Parameter]]] = []
        for start, stacks in self.groups:
            by_name: dict[str, dict[str, nn.Parameter]] = {}
            for layer, stack in stacks.items():
                for name, parameter in stack.named_parameters():
                    by_name.setdefault(name, {})[layer] = parameter
            named += [(start, name, parameters) for name, parameters in by_name.items()]
        buffer = torch.zeros(
            sum(p.numel() for _, _, parameters in named for p in parameters.values()), device=device, dtype=dtype
        )
        blocks, offset = [], 0
        for start, name, parameters in named:
            shapes = {layer: parameter.shape for layer, parameter in parameters.items()}
            num_members = next(iter(shapes.values()))[0]
            size = sum(shape.numel() for shape in shapes.values())
            gradients = buffer[offset : offset + size].view(num_members, -1)
            multiplier = torch.tensor(
                [[self.methods[start + m].learning_rate_multiplier(name)] for m in range(num_members)],
                device=device,
                dtype=torch.float64,
            )
            block = ParameterBlock(
                name=name,
                start=start,
                weights=torch.empty_like(gradients),
                gradients=gradients,
                multiplier=multiplier,
                shapes=shapes,
                is_decayed=self.methods[start].is_decayed(name),
            )
            weights, grads = block.views(block.weights), block.views(gradients)
            for layer, parameter in parameters.items():
                weights[layer].copy_(parameter.data)
                parameter.data, parameter.grad = weights[layer], grads[layer]
            blocks.append(block)
            offset += size
        return buffer, blocks


def _replace(base: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(base.get_submodule(parent), child, module)
