"""The settings that a method's block and an axis may have, and the checks of single values."""

import dataclasses
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, InstanceOf, PlainSerializer, TypeAdapter, ValidationError

import loragrid_methods
from loragrid.config.data_section import DataConfig
from loragrid.config.ladder import EXAMPLE, Ladder, as_written, ladder_values
from loragrid.config.method_source import declared_types
from loragrid.config.sections import HOLDING_KEYS, METHOD_TRAINING_KEYS, OBSERVATION_KEYS, ModelConfig, TrainingConfig
from loragrid.schema.errors import ExperimentError, Problem, show_value, unknown, what_is_wrong
from loragrid.schema.fields import MAX_SEED, Label, Section, Seed, allowed_by

AXIS_SECTIONS: dict[str, type[Section]] = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}

MAX_TRIALS = 10_000
"""Larger grids are refused as mistakes: six axes of ten values are a million trials."""

Scalar = str | int | float | bool | None
AxisValue = Scalar | tuple[str, ...] | tuple[int, ...]
"""One value of an axis; the tuples are for lists such as `target_modules` and `layers_to_transform`."""

UNSUPPORTED_SETTINGS = {
    "modules_to_save": (
        "LoraGrid does not train copies of whole modules, because the members of a pack share one base",
        "adapters on linear layers (target_modules); to train embeddings and head as well, the method full",
    ),
    "trainable_token_indices": (
        "LoraGrid does not train rows of the embedding, because the members of a pack share one base",
        "tokens that the model knows already; to train the embeddings of new tokens, the method full",
    ),
    "target_parameters": (
        "LoraGrid adapts linear layers, and no bare weights such as stacked experts",
        "names of linear layers in target_modules",
    ),
}
"""PEFT's settings that no method has: setting -> (why not, what is allowed instead)."""

AxisValues = Annotated[tuple[Any, ...], InstanceOf(), PlainSerializer(as_written)]
"""The values of an axis in an experiment; a ladder also keeps its written form."""


def check_method_name(name: object) -> None:
    """Raises ExperimentError unless a method has that name."""
    names = loragrid_methods.method_names()
    if not isinstance(name, str):
        raise ExperimentError([Problem(key="name", value=name, what="is not a name", allowed=", ".join(names))])
    if name not in names:
        raise ExperimentError([unknown("method", name, names, key="name", value=name)])


def hyperparameter_types(method: str) -> dict[str, Any]:
    """Hyperparameter -> type, for an existing method.

    Imports the method, and torch with it, only if its source file does not show the types.
    """
    if f"loragrid_methods.{method}" not in sys.modules and (declared := declared_types(method)) is not None:
        return declared
    method_class = loragrid_methods.get_method(method)
    hints = get_type_hints(method_class)
    given = {field.name for field in dataclasses.fields(method_class) if field.init}
    return {name: hints[name] for name in method_class.field_names() if name in given}


def sharding_obstacle(method: str) -> str:
    """Why an existing method cannot train on a sharded base, as the end of a sentence; "" if it can."""
    return loragrid_methods.get_method(method).sharding_obstacle


def setting_types(method: str) -> dict[str, Any]:
    """Key -> type, for every key of that method's block except `name`, `label` and `grid`."""
    hints = get_type_hints(TrainingConfig, include_extras=True)
    return hyperparameter_types(method) | {key: hints[key] for key in METHOD_TRAINING_KEYS}


def section_axis_types() -> dict[str, Any]:
    """Axis -> type, for every top-level axis that is not a method's hyperparameter."""
    axis_types: dict[str, Any] = {"seed": Seed}
    for section, section_class in AXIS_SECTIONS.items():
        hints = get_type_hints(section_class, include_extras=True)
        for field in section_class.model_fields:
            # `columns` is a mapping. Axes over keys outside a trial's identity would make trials with equal ids.
            if field != "columns" and field not in OBSERVATION_KEYS | HOLDING_KEYS:
                axis_types[f"{section}.{field}"] = hints[field]
    return axis_types


def check_value(value_type: Any, key: str, value: object) -> Any:
    """The value converted to its type (16 becomes 16.0 for a float, a list becomes a tuple).

    Raises ExperimentError naming key, value and what is allowed.
    """
    try:
        return _adapter(value_type).validate_python(tuple(value) if isinstance(value, list) else value)
    except ValidationError:
        allowed = describe_type(value_type)
        what = what_is_wrong(value, allowed)
        raise ExperimentError([Problem(key=key, value=value, what=what, allowed=allowed)]) from None


def _adapter(value_type: Any) -> TypeAdapter[Any]:
    if value_type is int:  # Python's integers are unbounded; tensor sizes and seeds are not
        value_type = Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)]
    return TypeAdapter(value_type, config=ConfigDict(strict=True, allow_inf_nan=False))


def describe_type(value_type: Any) -> str:
    """The values that a type allows, in words: the text of its `Allowed`, if it has one."""
    if allowed := allowed_by(getattr(value_type, "__metadata__", ())):
        return allowed
    origin = get_origin(value_type)
    if origin is Literal:
        return ", ".join(str(value) for value in get_args(value_type))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in get_args(value_type))
    if origin is tuple:
        return "a list of whole numbers" if int in get_args(value_type) else "a list of text"
    words = {
        int: f"a whole number of at most {MAX_SEED}",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return words.get(value_type, str(value_type))


def check_axis_shape(key: str, values: object) -> tuple[AxisValue, ...]:
    """The values of an axis as a tuple; raises ExperimentError unless they are a list of different plain values.

    A ladder becomes a `Ladder` of its values.
    """
    if isinstance(values, Ladder):
        return values
    if isinstance(values, Mapping):
        return Ladder(ladder_values(key, values), {str(name): part for name, part in values.items()})
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        what = "an axis is a list of its values"
        raise ExperimentError(
            [Problem(key=key, value=values, what=what, allowed=f"a list such as [1, 2], or {EXAMPLE}")]
        )
    if not values:
        raise ExperimentError(
            [Problem(key=key, value=values, what="an axis without values", allowed="at least one value")]
        )
    if len(values) > MAX_TRIALS:
        what = f"the axis has {len(values)} values, and every one is a trial"
        raise ExperimentError([Problem(key=key, what=what, allowed=f"at most {MAX_TRIALS}")])
    checked: list[AxisValue] = []
    for value in values:
        plain = tuple(value) if isinstance(value, list | tuple) else _without_subclass(value)
        if isinstance(plain, Mapping) or (isinstance(plain, tuple) and not _is_plain_list(plain)):
            allowed = "numbers, text, true, false, null, or lists of text or of whole numbers"
            raise ExperimentError([Problem(key=key, value=value, what="cannot be a value of an axis", allowed=allowed)])
        if plain in checked:
            what = f"the value {show_value(value)} occurs twice"
            raise ExperimentError([Problem(key=key, value=values, what=what, allowed="every value once")])
        checked.append(plain)
    return tuple(checked)


def _without_subclass(value: object) -> Any:
    """A number or text of its plain type: NumPy's float64 is a float that no file and no record can hold."""
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return value if type(value) is plain else plain(value)
    return value


def _is_plain_list(parts: tuple[Any, ...]) -> bool:
    return all(isinstance(part, str) for part in parts) or all(type(part) is int for part in parts)


def check_method_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """A method's block with every value checked on its own and converted to its type.

    Raises one ExperimentError with all problems of the block; their keys are relative to the block.
    """
    if "name" not in block:
        allowed = ", ".join(loragrid_methods.method_names())
        raise ExperimentError([Problem(key="name", what="is missing", allowed=allowed)])
    name = block["name"]
    check_method_name(name)
    known = setting_types(name)
    checked: dict[str, Any] = {"name": name}
    problems: list[Problem] = []
    for key, value in block.items():
        if key in ("name", "grid"):
            continue
        try:
            if key == "label":
                checked[key] = check_label(name, value)
            else:
                checked[key] = check_setting(name, known, key, value)
        except ExperimentError as error:
            problems += error.problems
    grid = block.get("grid", {})
    if not isinstance(grid, Mapping):
        grid_problem = Problem(key="grid", value=grid, what="is not a mapping", allowed="setting: [values]")
        raise ExperimentError([*problems, grid_problem])
    axes: dict[str, tuple[Any, ...]] = {}
    for key, values in grid.items():
        try:
            axes[key] = check_method_axis(name, known, key, values, fixed=key in block and key != "name")
        except ExperimentError as error:
            problems += error.under("grid").problems
    if problems:
        raise ExperimentError(problems)
    return checked | {"grid": axes}


def check_label(method: str, label: object) -> str | None:
    """A block's checked label; the name of another method is refused, because it would mislead."""
    text: str | None = check_value(Label, "label", label)
    if text != method and text in loragrid_methods.method_names():
        what = f"is another method's name, and this is {method}"
        raise ExperimentError([Problem(key="label", value=label, what=what, allowed="a name of its own")])
    return text


def label_problems(blocks: Sequence[tuple[str, str | None]]) -> list[Problem]:
    """The problems of (method, label) blocks in which two methods share one label.

    Comparisons distinguish trials by label and axes. Trials of the two methods with equal axes would count as one.
    """
    methods: dict[str, str] = {}
    problems = []
    for place, (method, label) in enumerate(blocks):
        first = methods.setdefault(label or method, method)
        if first != method:
            what = f"is {first}'s label already, and this is {method}"
            problems.append(
                Problem(key=f"methods.{place}.label", value=label, what=what, allowed="one method under one label")
            )
    return problems


def check_method_axis(
    method: str, known: Mapping[str, Any], key: str, values: object, *, fixed: bool
) -> tuple[Any, ...]:
    """The values of an axis of a method's own grid, each converted to its type."""
    plain = check_axis_shape(key, values)
    if fixed:
        what = "is set to one value and is an axis too"
        raise ExperimentError([Problem(key=key, value=values, what=what, allowed="one of the two")])
    checked = tuple(check_setting(method, known, key, value) for value in plain)
    return Ladder(checked, plain.written) if isinstance(plain, Ladder) else checked


def check_setting(method: str, known: Mapping[str, Any], key: str, value: object) -> Any:
    """The value of one key of a method's block; `known` is `setting_types(method)`."""
    if key in UNSUPPORTED_SETTINGS and key not in known:
        what, allowed = UNSUPPORTED_SETTINGS[key]
        raise ExperimentError([Problem(key=key, value=value, what=what, allowed=allowed)])
    if key not in known:
        raise ExperimentError([unknown(f"setting of {method}", key, [*known, "label"], key=key, value=value)])
    return check_value(known[key], key, value)
