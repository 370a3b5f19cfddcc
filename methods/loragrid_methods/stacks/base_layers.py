"""Lists the linear layers of a base that can be adapted, and says of every other module why it cannot."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

from torch import nn

from loragrid_methods.stacks.text_forward import TextForward, follow_text, is_torchs_own, num_axes

Role = Literal["unreached", "blocked", "other"]
"""Why a module is not among the adaptable layers.

unreached: text never passes through it, or no gradient comes back (a vision tower). blocked: it is a linear map of the
text path, and it cannot be adapted (stacked experts). other: it is no linear map, or it is the head.
"""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One adaptable linear layer: y (.., out_features) = x (.., in_features) W^T.

    `transposed`: the weight is stored as (in, out), as in transformers' `Conv1D` (GPT-2).
    """

    name: str
    in_features: int
    out_features: int
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class OtherModule:
    """A module or bare weight of a base that is not adapted; `reason` completes the sentence "... because ...".

    is_linear: it is an `nn.Linear` or `Conv1D`. holder: of a bare weight, the module that holds it.
    """

    name: str
    role: Role
    reason: str
    is_linear: bool = False
    holder: str = ""


class BaseLayers(list[LayerShape]):
    """The adaptable layers of a base in the order of the model; `others` are its other modules, in the same order.

    unmoved: the base's parameters that get no gradient from text -> their number of values.
    """

    def __init__(
        self,
        layers: Iterable[LayerShape] = (),
        others: Iterable[OtherModule] = (),
        unmoved: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(layers)
        self.others, self.unmoved = tuple(others), dict(unmoved or {})


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, judged by its name because this package only imports torch."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer: `nn.Linear`, a class derived from it, or `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def adaptable_layers(base: nn.Module, output_layer: nn.Module | None = None) -> BaseLayers:
    """The linear layers of `base` that can be adapted, except `output_layer` (the head), in the order of the model.

    A layer can be adapted if text passes through it, a gradient comes back, and the model only uses it by calling it
    with every token of every row. One pass of text through a copy of the base without data shows this
    (`text_forward`), so the answer is the same for a base on the meta device. It is remembered for each base, and for
    bases of equal structure. If the pass fails, every layer below the base's text decoder counts as reached.
    """
    names = frozenset(name for name, _ in base.named_modules())
    remembered = _of_base.get(base)
    if remembered is None or remembered[0] != names:
        remembered = _of_base[base] = (names, _follow(base))
    return _Sorting(base, output_layer, remembered[1]).layers()


_of_base: "WeakKeyDictionary[nn.Module, tuple[frozenset[str], TextForward]]" = WeakKeyDictionary()
"""Base -> its modules' names and its pass of text. A base that has been sharded cannot be copied and asked again."""
_of_structure: dict[object, TextForward] = {}
_MOST_STRUCTURES = 16


def _follow(base: nn.Module) -> TextForward:
    """The pass of text through a base; one that has a configuration shares it with all bases of equal structure."""
    config = getattr(base, "config", None)
    if config is None:
        return follow_text(base, is_linear)
    modules = tuple((name, type(module)) for name, module in base.named_modules())
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in base.named_parameters())
    structure = (modules, shapes, str(config))
    if structure not in _of_structure:
        if len(_of_structure) == _MOST_STRUCTURES:
            del _of_structure[next(iter(_of_structure))]
        _of_structure[structure] = follow_text(base, is_linear)
    return _of_structure[structure]


class _Sorting:
    """Sorts the modules of a base by what a pass of text has shown about them."""

    def __init__(self, base: nn.Module, output_layer: nn.Module | None, found: TextForward) -> None:
        self._base, self._output_layer, self._found = base, output_layer, found
        self._modules = dict(base.named_modules())
        # A module counts as entered if a module inside it was; a `ModuleList` has no forward of its own.
        self._entered = {part for name in found.entered for part in _with_parents(name)}
        self._moved = {part for name in found.moved for part in _with_parents(name.rpartition(".")[0])}
        self._decoder = "" if not found.obstacle else _decoder_name(base)
        self._routed = set(self._routed_layers()) if found.obstacle else set()
        self._places: dict[int, list[str]] = {}
        for name, module in base.named_modules(remove_duplicate=False):
            if is_linear(module):
                self._places.setdefault(id(module), []).append(name)

    def layers(self) -> BaseLayers:
        """Every module but the base itself, sorted."""
        layers: list[LayerShape] = []
        others: list[OtherModule] = []
        for name, module in self._modules.items():
            if not name:
                continue
            if not is_linear(module):
                others += self._no_layer(name, module)
            elif (obstacle := self._obstacle(name, module)) is not None:
                others.append(obstacle)
            else:
                layers.append(_shape_of(name, module))
        unmoved = {} if self._found.obstacle else self._unmoved()
        return BaseLayers(layers, others, unmoved)

    def _unmoved(self) -> dict[str, int]:
        parameters = self._base.named_parameters()
        return {name: parameter.numel() for name, parameter in parameters if name not in self._found.moved}

    def _obstacle(self, name: str, layer: nn.Module) -> OtherModule | None:
        """Why a linear layer is not adapted; None if it is adaptable."""
        found = self._found
        role: Role = "blocked"
        if layer is self._output_layer:
            role, reason = "other", "it is the head, whose weight the loss multiplies in parts without calling it"
        elif not self._is_reached(name):
            never = not found.obstacle and name in self._entered
            role, reason = "unreached", "no gradient comes back to it" if never else "text never passes through it"
        elif name in found.read or (not found.obstacle and name not in self._entered):
            reason = "the model uses its weight without calling it"
        elif name in found.read_in_training:
            reason = "in training mode the model uses its weight without calling it"
        elif name in found.irregular:
            reason = found.irregular[name]
        elif name in self._routed:
            reason = "the model decides from their values which tokens it gets"
        elif len(self._places[id(layer)]) > 1 and _own_parents(self._places[id(layer)], self._modules) > 1:
            reason = f"it is the same layer as {self._places[id(layer)][1]}"
        else:
            return None
        return OtherModule(name=name, role=role, reason=reason, is_linear=True)

    def _no_layer(self, name: str, module: nn.Module) -> Iterator[OtherModule]:
        """A module that is no linear layer, and the matrices that it holds and multiplies itself."""
        what = type(module).__name__
        if not self._is_reached(name):
            yield OtherModule(name=name, role="unreached", reason="text never passes through it")
            return
        bare = {} if is_torchs_own(module) else dict(module.named_parameters(recurse=False))
        held = [own for own, parameter in bare.items() if self._is_matrix(f"{name}.{own}", parameter)]
        if not held:
            yield OtherModule(name=name, role="other", reason=f"it is no linear layer ({what})")
            return
        reason = f"{what} multiplies weights of its own: " + ", ".join(f"{own} {_shape(bare[own])}" for own in held)
        yield OtherModule(name=name, role="blocked", reason=reason)
        for own in held:
            for named in (own, *_fused_parts(own)):
                yield OtherModule(name=f"{name}.{named}", role="blocked", reason=reason, holder=name)

    def _is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        found = self._found
        if name in found.multiplied:
            return True
        # A stack is mostly indexed before it is multiplied, so its products are not seen.
        return num_axes(parameter) > 2 and (bool(found.obstacle) or name in found.moved)

    def _is_reached(self, name: str) -> bool:
        if self._found.obstacle:
            below = not self._decoder or f"{name}.".startswith(f"{self._decoder}.")
            return below or name in self._entered or self._decoder.startswith(f"{name}.")
        if is_linear(self._modules[name]):
            return name in self._moved and (name in self._entered or not self._shares_weight(name))
        return name in self._entered

    def _shares_weight(self, name: str) -> bool:
        """Whether another linear layer that was called has the same weight."""
        weight = self._modules[name].weight
        return any(
            other != name and other in self._entered and module.weight is weight
            for other, module in self._modules.items()
            if is_linear(module)
        )

    def _routed_layers(self) -> Iterator[str]:
        """The linear layers that a pass without data did not reach in modules of the kind in which it ended.

        Such a module makes a decision from values: a mixture of experts that calls the experts that were hit.
        """
        ended_in = self._found.chose_by_value_in
        # The whole model may need a value for its masks, too; only a numbered layer can be one that routes tokens.
        if not re.search(r"\.\d+(\.|$)", ended_in):
            return
        kind = type(self._modules[ended_in])
        entered = {name.removeprefix(ended_in) for name in self._found.entered if name.startswith(f"{ended_in}.")}
        for start in (name for name, module in self._modules.items() if type(module) is kind):
            for name, module in self._modules.items():
                if name.startswith(f"{start}.") and is_linear(module) and name.removeprefix(start) not in entered:
                    yield name


def _shape_of(name: str, layer: nn.Module) -> LayerShape:
    if isinstance(layer, nn.Linear):
        return LayerShape(name=name, in_features=layer.in_features, out_features=layer.out_features)
    assert isinstance(layer.weight, nn.Parameter)
    in_features, out_features = layer.weight.shape
    return LayerShape(name=name, in_features=in_features, out_features=out_features, transposed=True)


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _own_parents(places: list[str], modules: dict[str, nn.Module]) -> int:
    """The number of different modules that hold a layer found in these places.

    A parent that is itself found in several places is listed once in `modules`, so its other places are missing there.
    """
    return sum(place.rpartition(".")[0] in {"", *modules} for place in places)


def _decoder_name(base: nn.Module) -> str:
    """The name of the part of the base that processes text; "" if the base does not say."""
    find = getattr(base, "get_decoder", None)
    decoder = find() if callable(find) else None
    return next((name for name, module in base.named_modules() if module is decoder), "")


def _fused_parts(name: str) -> list[str]:
    """The names under which the parts of a fused weight are known: gate_proj and up_proj for gate_up_proj."""
    *parts, last = name.split("_")
    return [f"{part}_{last}" for part in parts] if len(parts) > 1 else []


def _shape(parameter: nn.Parameter) -> str:
    return "(" + " x ".join(map(str, parameter.shape)) + ")"
