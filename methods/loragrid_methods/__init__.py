"""The methods that LoraGrid compares, one file each; the file's name is the method's name everywhere.

Importing this package does not import torch, because method names are read from file names. torch is imported when the
first method or class is requested.
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
    """The names of all methods in alphabetical order; each is the name of a file beside this one."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg))


def get_method(name: str) -> type["Method"]:
    """Return the method class called `name`.

    Raises:
        ValueError: there is no such method; the message lists all names.
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
