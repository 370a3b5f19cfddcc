"""The methods LoraGrid compares: one file per method, whose name is the method's name everywhere else.

Importing this package does not import torch: the names of the methods are the names of its files. torch is imported
with the first method or class that is asked for.
"""

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loragrid_methods.stacks.contract import Card, LayerShape, Method, ParameterCount

__all__ = ["Card", "LayerShape", "Method", "ParameterCount", "get_method", "method_names"]

_CONTRACT = ("Card", "LayerShape", "Method", "ParameterCount")


def method_names() -> tuple[str, ...]:
    """The names of all methods, which are the names of the files beside this one, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg))


def get_method(name: str) -> type["Method"]:
    """Return the method of that name.

    Raises:
        ValueError: no file of that name; the message lists the names there are.
    """
    names = method_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(names)}.{hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    found: list[type[Method]] = [value for value in vars(module).values() if _is_method_of(value, module.__name__)]
    assert len(found) == 1, f"{module.__name__} must define exactly one method, not {len(found)}"
    return found[0]


def _is_method_of(value: object, module_name: str) -> bool:
    from loragrid_methods.stacks.contract import Method

    return isinstance(value, type) and issubclass(value, Method) and value.__module__ == module_name


def __getattr__(name: str) -> Any:
    if name not in _CONTRACT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("loragrid_methods.stacks.contract"), name)
