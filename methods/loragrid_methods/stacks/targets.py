"""Selects the layers that a method adapts: `target_modules` and what limits them, as PEFT reads them."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loragrid_methods.stacks.base_layers import BaseLayers, LayerShape, OtherModule, adaptable_layers, is_conv1d
from loragrid_methods.stacks.peft_names import Names, is_named, layer_number, shortest_names

__all__ = ["ALL_LINEAR", "LayerShape", "Targets", "adaptable_layers", "is_conv1d", "select_layers"]

ALL_LINEAR = "all-linear"
MOST_NAMED = 4
"""The most modules that an error message lists."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The settings that select layers, with PEFT's names and meaning.

    `target_modules`: "all-linear" is every linear layer that text passes through, without the head; another string is
    a regular expression for whole names; a sequence holds names or last parts of names (`q_proj`).
    `layers_to_transform`: only layers with these numbers. `layers_pattern`: the part of the name before that number.
    `exclude_modules`: names like those of `target_modules` that are left out.
    """

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None

    @property
    def is_all_linear(self) -> bool:
        """Whether `target_modules` is the word for every linear layer, which PEFT reads in any case."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """`layers_to_transform` as a tuple; None if it is not set."""
        numbers = self.layers_to_transform
        return (numbers,) if isinstance(numbers, int) else numbers

    def select(self, layers: Sequence[LayerShape]) -> list[LayerShape]:
        """The selected layers in the order of the model.

        `layers`: a base's adaptable layers; `BaseLayers` also know its other modules. A module that gets no gradient
        from text is left out if something else has the same name, because its adapter would stay zero.

        Raises:
            ValueError: a value is refused, an entry matches nothing or only modules without a gradient, or the
                selection includes a module that cannot be adapted; the message names it, the reason and the remedy.
        """
        others = layers.others if isinstance(layers, BaseLayers) else ()
        self._check_values()
        self._check_entries(layers, others)
        selected = [layer for layer in layers if self._includes(layer.name)]
        barred = [
            other
            for other in others
            if other.role == "blocked" or (other.role == "other" and not self.is_all_linear)
            if self._includes(other.name) and not self._is_excluded(other.holder)
        ]
        if barred:
            raise ValueError(self._barred(barred, layers, others))
        unreached = [other for other in others if other.role == "unreached" and self._includes(other.name)]
        if not selected and unreached and not self.is_all_linear:
            raise ValueError(f"target_modules: {self.target_modules!r} matches only {_no_gradient(unreached)}")
        self._check_limits(layers, others)
        if not selected:
            raise ValueError(f"target_modules: {self.target_modules!r} matches no layer; {_endings(layers)}")
        return selected

    def left_out(self, layers: Sequence[LayerShape]) -> list[OtherModule]:
        """The linear layers that the settings name and that are left out because they get no gradient from text."""
        others = layers.others if isinstance(layers, BaseLayers) else ()
        unreached = (other for other in others if other.role == "unreached" and other.is_linear)
        return [other for other in unreached if self._includes(other.name)]

    def _includes(self, name: str) -> bool:
        return self._is_target(name) and self._has_number(name) and not self._is_excluded(name)

    def _is_excluded(self, name: str) -> bool:
        return bool(self.exclude_modules) and is_named(self.exclude_modules or (), name)

    def _targets(self, layers: Sequence[LayerShape], others: Sequence[OtherModule]) -> list[str]:
        """The names of all modules that `target_modules` names, whatever limits it."""
        names = [*(layer.name for layer in layers), *(other.name for other in others)]
        return [name for name in names if self._is_target(name)]

    def _is_target(self, name: str) -> bool:
        return self.is_all_linear or is_named(self.target_modules, name)

    def _has_number(self, name: str) -> bool:
        # As in PEFT, a layer that a list names in full is adapted whatever its number is.
        if self.numbers is None or (not self.is_all_linear and name in self.target_modules):
            return True
        return layer_number(name, self.layers_pattern) in self.numbers

    def _check_values(self) -> None:
        is_expression = isinstance(self.target_modules, str) and not self.is_all_linear
        for key, value in (("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules)):
            if isinstance(value, str):
                _check_expression(key, value)
            elif value is not None:
                _check_list(key, value)
        for pattern in _as_tuple(self.layers_pattern):
            _check_expression("layers_pattern", pattern)
        if self.numbers is None:
            if self.layers_pattern is not None:
                allowed = "only together with layers_to_transform"
                raise ValueError(f"layers_pattern: {self.layers_pattern!r} is not allowed; allowed: {allowed}")
            return
        if is_expression:
            raise ValueError(
                f"layers_to_transform: {self.layers_to_transform!r} cannot limit a regular expression (target_modules: "
                f"{self.target_modules!r}), as in PEFT; write the numbers into the expression, or list names"
            )
        if not self.numbers or min(self.numbers) < 0 or len({*self.numbers}) < len(self.numbers):
            allowed = "numbers of layers, each once, counted from 0"
            raise ValueError(f"layers_to_transform: {self.layers_to_transform!r} is not allowed; allowed: {allowed}")

    def _check_entries(self, layers: Sequence[LayerShape], others: Sequence[OtherModule]) -> None:
        """Refuse an entry of a list that matches nothing, or only modules that get no gradient from text."""
        if isinstance(self.target_modules, str):
            if self.is_all_linear or self._targets(layers, others):
                return
            hint = ""
            if re.fullmatch(r"[\w.,\s-]+", self.target_modules):
                parts = re.split(r"[,\s]+", self.target_modules.strip())
                hint = f"; a text is a regular expression for whole names, so list last parts: [{', '.join(parts)}]"
            raise ValueError(f"target_modules: {self.target_modules!r} matches no layer; {_endings(layers)}{hint}")
        for entry in self.target_modules:
            if any(is_named([entry], layer.name) for layer in layers):
                continue
            named = [other for other in others if is_named([entry], other.name)]
            if not named:
                close = difflib.get_close_matches(entry, [layer.name.rpartition(".")[2] for layer in layers], n=1)
                hint = f". Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"target_modules: {entry!r} matches no layer; {_endings(layers)}{hint}")
            if all(other.role == "unreached" for other in named):
                raise ValueError(f"target_modules: {entry!r} matches only {_no_gradient(named)}")

    def _check_limits(self, layers: Sequence[LayerShape], others: Sequence[OtherModule]) -> None:
        """Refuse a limit without an effect: an excluded name or a number that no target has."""
        excluded = self.exclude_modules
        for entry in (excluded,) if isinstance(excluded, str) else (excluded or ()):
            self._check_excluded(entry if isinstance(excluded, str) else [entry], layers, others)
        # A vision tower may have more layers than the language model.
        reached = [*(layer.name for layer in layers), *(other.name for other in others if other.role == "blocked")]
        numbers = (layer_number(name, self.layers_pattern) for name in reached if self._is_target(name))
        known = sorted({number for number in numbers if number is not None})
        for number in self.numbers or ():
            if number not in known:
                pattern = f" (layers_pattern: {self.layers_pattern!r})" if self.layers_pattern else ""
                allowed = f"{known[0]} to {known[-1]}" if known else f"none: no target's name has a number{pattern}"
                raise ValueError(f"layers_to_transform: no target is in layer {number}{pattern}; allowed: {allowed}")

    def _check_excluded(
        self, names: str | Sequence[str], layers: Sequence[LayerShape], others: Sequence[OtherModule]
    ) -> None:
        """Refuse an entry of `exclude_modules` that leaves out no target, or only a container and not what is in it."""
        entry = names if isinstance(names, str) else names[0]
        named = [other for other in others if is_named(names, other.name)]
        # `all-linear` selects no container. An expression for targets may select one, which is then left out rightly.
        containers = [other.name for other in named if self._is_mere_container(other)]
        for container in containers:
            inside = [layer.name for layer in layers if layer.name.startswith(f"{container}.")]
            if any(self._includes(name) for name in inside):
                parts = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in inside))
                whole = entry if isinstance(names, str) else rf"(.*\.)?{re.escape(entry)}"
                raise ValueError(
                    f"exclude_modules: {entry!r} names {container}, and as in PEFT that excludes none of the layers "
                    f"inside it ({parts}); list last parts of their names, or write a regular expression for whole "
                    f"names: exclude_modules: '{whole}\\..*'"
                )
        targets = [layer.name for layer in layers if self._is_target(layer.name)]
        targets += [other.name for other in named if other.name not in containers and self._is_target(other.name)]
        if not any(is_named(names, name) for name in targets):
            what = f"{entry!r} excludes none of the layers that target_modules selects"
            raise ValueError(f"exclude_modules: {what}; {_endings(layers)}")

    def _is_mere_container(self, module: OtherModule) -> bool:
        """Whether a module is no target itself: it is no linear map, and text passes through it."""
        is_selected = not self.is_all_linear and self._is_target(module.name)
        return module.role == "other" and not module.is_linear and not is_selected

    def _barred(
        self, barred: Sequence[OtherModule], layers: Sequence[LayerShape], others: Sequence[OtherModule]
    ) -> str:
        """The message for a selection that includes modules that cannot be adapted."""
        reasons = _with_reasons(barred)
        reached = [other.name for other in others if other.role != "unreached"]
        names = shortest_names([layer.name for layer in layers], reached)
        adaptable = names if isinstance(names, str) else f"[{', '.join(names[:12])}]"
        if not self.is_all_linear:
            what = f"{self.target_modules!r} includes what cannot be adapted: {reasons}"
            return f"target_modules: {what}; name other layers: target_modules: {adaptable}"
        endings = dict.fromkeys(other.name.rpartition(".")[2] for other in barred if _is_outermost(other, barred))
        return (
            f"target_modules: {self.target_modules!r} means every linear map that text passes through, and some cannot "
            f"be adapted: {reasons}; name the layers to adapt, as in target_modules: {adaptable}, or leave these out "
            f"with exclude_modules: [{', '.join(endings)}]"
        )


def select_layers(target_modules: str | Sequence[str], layers: Sequence[LayerShape]) -> list[LayerShape]:
    """The layers that `target_modules` names, as PEFT reads it; see `Targets`."""
    names = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    return Targets(target_modules=names).select(layers)


def _check_expression(key: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{key}: {value!r} is not a valid regular expression: {error}") from error


def _check_list(key: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{key}: {name!r} is named twice; allowed: every name once")
    if "" in names:
        raise ValueError(f"{key}: '' is not allowed; allowed: names of modules, or their last parts")


def _as_tuple(names: Names | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _endings(layers: Iterable[LayerShape]) -> str:
    return "the model's layers end in: " + ", ".join(sorted({layer.name.rpartition(".")[2] for layer in layers}))


def _no_gradient(modules: Sequence[OtherModule]) -> str:
    return f"modules that training on text cannot change: {_with_reasons(modules)}; name layers of the language model"


def _is_outermost(module: OtherModule, modules: Sequence[OtherModule]) -> bool:
    return not any(module.name.startswith(f"{other.name}.") for other in modules)


def _with_reasons(modules: Sequence[OtherModule]) -> str:
    """The modules with their reasons, each once for all layers: model.layers.*.mlp.experts (...)."""
    named: dict[str, str] = {}
    for module in modules:
        if _is_outermost(module, modules):
            named.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", module.name), module.reason)
    listed = [f"{name} ({reason})" for name, reason in [*named.items()][:MOST_NAMED]]
    more = f", and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return ", ".join(listed) + more
