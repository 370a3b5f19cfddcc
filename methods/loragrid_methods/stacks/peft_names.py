"""PEFT's rules for `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern`.

Reference code: PEFT 0.21, `check_target_module_exists` in `peft/tuners/tuners_utils.py`.
"""

import re
from collections.abc import Iterable, Sequence

Names = str | Sequence[str]
"""Modules as PEFT names them: a regular expression for whole names, or a list of names and last parts of names."""


def is_named(names: Names, module: str) -> bool:
    """Whether `names` include a module."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def layer_number(module: str, layers_pattern: Names | None = None) -> int | None:
    """The number of the layer that a module belongs to; None if it belongs to none.

    It is the first number in the module's name that follows a part of the name, and is followed by another one.
    `layers_pattern`: the number must follow one of these parts (regular expressions).
    """
    if not layers_pattern:
        match = re.match(r".*?\.[^.]*\.(?P<number>\d+)\.", module)
    else:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.", module) for pattern in patterns)
        match = next((each for each in found if each is not None), None)
    return None if match is None else int(match["number"])


def shortest_names(chosen: Sequence[str], others: Iterable[str]) -> str | list[str]:
    """`target_modules` that PEFT resolves to exactly the modules `chosen` of a model whose other modules are `others`.

    A list of last parts, each as short as possible. PEFT matches a whole name against last parts, too; if that would
    include one of the others, the result is a regular expression.
    """
    of_others = {ending for name in others for ending in _endings(name)}
    names: dict[str, None] = {}
    for module in chosen:
        own = next((ending for ending in _endings(module) if ending not in of_others), None)
        if own is None:
            return "|".join(re.escape(name) for name in chosen)
        names[own] = None
    return list(names)


def _endings(name: str) -> list[str]:
    """The last parts of a name, the shortest first, the whole name last."""
    parts = name.split(".")
    return [".".join(parts[index:]) for index in reversed(range(len(parts)))]
