"""The methods LoraGrid compares: one file per method, whose name is the method's name everywhere else."""

import difflib
import importlib
import pkgutil

from loragrid_methods.stacks.contract import Card, LayerShape, Method, ParameterCount

__all__ = ["Card", "LayerShape", "Method", "ParameterCount", "get_method", "method_names"]


def method_names() -> tuple[str, ...]:
    """Every method there is: the names of the files beside this one, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg))


def get_method(name: str) -> type[Method]:
    """The method of that name.

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
    return isinstance(value, type) and issubclass(value, Method) and value.__module__ == module_name
