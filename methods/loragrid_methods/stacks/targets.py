"""Lists the layers of a base that can be adapted, and selects those that a method's `target_modules` names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One adaptable linear layer: y (.., out_features) = x (.., in_features) W^T.

    `transposed`: the weight is stored as (in, out), as in transformers' `Conv1D` (GPT-2).
    """

    name: str
    in_features: int
    out_features: int
    transposed: bool = False


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, judged by its name because this package only imports torch."""
    return type(module).__name__ == "Conv1D"


def adaptable_layers(base: nn.Module, output_layer: nn.Module | None = None) -> list[LayerShape]:
    """Every `nn.Linear` and `Conv1D` of `base` except `output_layer` (the head), in the order of the model."""
    layers = []
    for name, module in base.named_modules():
        if module is output_layer:
            continue
        if isinstance(module, nn.Linear):
            layers.append(LayerShape(name=name, in_features=module.in_features, out_features=module.out_features))
        elif is_conv1d(module):
            in_features, out_features = module.weight.shape
            layers.append(LayerShape(name=name, in_features=in_features, out_features=out_features, transposed=True))
    return layers


def select_layers(target_modules: str | Sequence[str], layers: Sequence[LayerShape]) -> list[LayerShape]:
    """The layers that `target_modules` names, as PEFT reads it.

    "all-linear" is every adaptable layer; another string is a regular expression for the whole name; a sequence holds
    names or last parts of names (`q_proj`).

    Raises:
        ValueError: a string is no regular expression, nothing matches, or an entry of a sequence matches nothing; then
            the message lists the last parts of the layers' names.
    """
    endings = ", ".join(sorted({layer.name.rpartition(".")[2] for layer in layers}))
    if target_modules == ALL_LINEAR:
        selected = list(layers)
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            what = f"{target_modules!r} is not a valid regular expression: {error}"
            raise ValueError(f"target_modules: {what}") from error
        selected = [layer for layer in layers if pattern.fullmatch(layer.name)]
    else:
        for target in target_modules:
            if not any(_ends_with(layer.name, target) for layer in layers):
                raise ValueError(f"target_modules: {target!r} matches no layer; the model's layers end in: {endings}")
        selected = [layer for layer in layers if any(_ends_with(layer.name, target) for target in target_modules)]
    if not selected:
        raise ValueError(f"target_modules: {target_modules!r} matches no layer; the model's layers end in: {endings}")
    return selected


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
