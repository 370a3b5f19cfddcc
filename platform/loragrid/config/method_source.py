"""Reads a method's hyperparameters from its source file, because importing the method imports torch.

Most mistakes in an experiment file concern names and types. They are reported in a fraction of a second only if torch
stays out of the process.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple, "Literal": Literal}
_TYPE_NODES = (ast.BinOp, ast.BitOr, ast.Constant, ast.Load, ast.Name, ast.Subscript, ast.Tuple)
_PLAIN_DEFAULTS = (ast.Attribute, ast.Constant, ast.Name, ast.Tuple, ast.UnaryOp)


_TARGETED = "loragrid_methods.stacks.targeted"
"""The module whose class declares the hyperparameters of all methods that adapt layers."""


class _NotPlainError(Exception):
    """This module cannot read the source; the method must be imported."""


def declared_types(method: str) -> dict[str, Any] | None:
    """Return hyperparameter -> type as the method's file declares them, in the order of `Method.field_names`.

    Returns None if this module cannot read the file; the caller then imports the method. It can read one class, derived
    from `Method` or from another method's class, with fields of plain types.
    """
    try:
        types = _read(method)[1]
        last = [name for name in _read(_TARGETED.partition(".")[2])[1] if name in types]
    except _NotPlainError:
        return None
    return {name: types[name] for name in (*(name for name in types if name not in last), *last)}


@functools.cache
def _read(method: str) -> tuple[str, dict[str, Any]]:
    """The name of the method's class, and hyperparameter -> type."""
    spec = importlib.util.find_spec(f"loragrid_methods.{method}")
    if spec is None or spec.origin is None:
        raise _NotPlainError
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name: (statement.module or "", alias.name)
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    found = []
    for definition in (statement for statement in tree.body if isinstance(statement, ast.ClassDef)):
        inherited = _inherited(definition, imported)
        if inherited is not None:
            found.append((definition.name, inherited | dict(_fields(definition))))
    if len(found) != 1:
        raise _NotPlainError
    return found[0]


def _inherited(definition: ast.ClassDef, imported: dict[str, tuple[str, str]]) -> dict[str, Any] | None:
    """The hyperparameters that a class inherits from a method or `Method`; None if it derives from neither."""
    bases = [base.id for base in definition.bases if isinstance(base, ast.Name)]
    origins = [imported.get(base, ("", base)) for base in bases]
    if ("loragrid_methods", "Method") in origins or any(
        name == "Method" and module.startswith("loragrid_methods.") for module, name in origins
    ):
        inherited: dict[str, Any] = {}
    else:
        methods = [
            fields
            for module, name in origins
            if module == _TARGETED or (module.startswith("loragrid_methods.") and module.count(".") == 1)
            for class_name, fields in [_read(module.partition(".")[2])]
            if class_name == name
        ]
        if not methods:
            return None
        inherited = methods[0]
    if len(definition.bases) != 1:
        raise _NotPlainError
    return inherited


def _fields(definition: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """Field -> type of a dataclass's own fields."""
    for statement in definition.body:
        if not isinstance(statement, ast.AnnAssign) or _is_class_variable(statement.annotation):
            continue
        if not isinstance(statement.target, ast.Name) or not isinstance(statement.value, _PLAIN_DEFAULTS):
            raise _NotPlainError
        yield statement.target.id, _type_of(statement.annotation)


def _is_class_variable(annotation: ast.expr) -> bool:
    base = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return isinstance(base, ast.Name) and base.id == "ClassVar"


def _type_of(annotation: ast.expr) -> Any:
    for node in ast.walk(annotation):
        if not isinstance(node, _TYPE_NODES) or (isinstance(node, ast.Name) and node.id not in _TYPES):
            raise _NotPlainError
    if isinstance(annotation, ast.Constant):  # an annotation in quotes
        raise _NotPlainError
    # `eval` is safe: the loop above lets only names of `_TYPES`, constants, `|` and `[...]` through.
    return eval(compile(ast.Expression(annotation), "<annotation>", "eval"), {"__builtins__": {}}, dict(_TYPES))
