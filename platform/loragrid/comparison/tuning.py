"""Finds whether a chosen setting is at the end of a ladder of tried values, and which setting is the default."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

from loragrid.comparison.settings import Setting
from loragrid.comparison.table import Comparison
from loragrid.config.method_settings import hyperparameter_types
from loragrid.config.sections import LENGTH_KEYS, METHOD_TRAINING_KEYS, TrainingConfig
from loragrid.formatting import format_value, is_missing
from loragrid.tracking.store_uri import Scalar

BATCH_SIZE = "training.batch_size"
EPOCHS = "training.epochs"


def edge_sides(best: Setting, tried: Sequence[Setting], ladders: Collection[str] = ()) -> dict[str, str]:
    """Axis -> lowest or highest, if the best value is at an end of its ladder.

    The ladder consists of the settings that differ from the best one only in this axis. ladders: axes that are ladders
    whatever their values, see `ladder_axes`; other axes are ladders if they have fractional values. A best value of 0
    is never at an end, because no ladder can be extended below 0.
    """
    sides: dict[str, str] = {}
    for axis, value in best.values.items():
        others = _without(best.values, axis)
        beside = [setting.values[axis] for setting in tried if _without(setting.values, axis) == others]
        numbers = [own for own in beside if isinstance(own, int | float) and not isinstance(own, bool)]
        is_ladder = axis in ladders or any(isinstance(number, float) for number in numbers)
        if is_ladder and len(numbers) > 1 and value != 0 and value in (min(numbers), max(numbers)):
            sides[axis] = "lowest" if value == min(numbers) else "highest"
    return sides


def ladder_axes(comparison: Comparison, label: str) -> set[str]:
    """The axes of a method that are ladders, by their type or because the experiment file writes them as ladders.

    label: the method's entry in the table. For a key that accepts fractions (learning rates and their ratios, scalings,
    decays), and for the batch size, both too small and too large values hurt. A best value at the end therefore means
    that the ladder was too short, even if its values are integers. For other integer keys (rank, steps) a higher cost
    buys quality, and the best value is expected at the end of a list. An axis written as
    `{ladder: [4, 64], points: 5}` is a ladder too.
    """
    written = {*_written_ladders(comparison.sweep_parameters, label), BATCH_SIZE}
    method = comparison.methods.get(label, label)
    return {axis for axis, path in comparison.axes.items() if path in written or _takes_fractions(method, path)}


def budget_words(comparison: Comparison, chosen: Mapping[str, Setting]) -> str:
    """A sentence on chosen settings that trained on different numbers of rows; "" if all trained on equally many.

    chosen: name in the verdict -> setting. At equal steps a larger batch reads more rows, so a difference between two
    methods can be one of budgets.
    """
    sizes = {name: _value_at(comparison, setting, BATCH_SIZE) for name, setting in chosen.items()}
    known = {name: size for name, size in sizes.items() if size is not None}
    if len(set(known.values())) < 2:
        return ""
    if EPOCHS not in comparison.axes.values() and _parsed(comparison.sweep_parameters.get(EPOCHS, "")):
        return ""  # the same epochs are the same rows, at every batch size
    steps = {name: _value_at(comparison, chosen[name], "training.steps") or 1 for name in known}
    rows = {name: size * steps[name] for name, size in known.items()}
    most, least = max(rows.values()), min(rows.values())
    if most == least:
        return ""
    when = "at equal steps" if len(set(steps.values())) == 1 else "with their own numbers of steps"
    parts = [
        f"{', '.join(name for name in known if (known[name], rows[name]) == part)} (batch {part[0]})"
        for part in sorted({(known[name], rows[name]) for name in known}, key=lambda part: part[1], reverse=True)
    ]
    return (
        f"Batch sizes differ: {when}, {parts[0]} trained on {format_value(round(most / least, 2))} times the rows of "
        f"{parts[-1]}" + (f"; between them: {', '.join(parts[1:-1])}." if parts[1:-1] else ".")
    )


def _value_at(comparison: Comparison, setting: Setting, path: str) -> int | None:
    """A whole number at which a setting's trials were trained; None if the sweep does not vary the key."""
    axis = next((axis for axis, own in comparison.axes.items() if own == path), None)
    if axis is None:
        return None
    if axis in setting.values:
        value = setting.values[axis]
    else:  # an axis that does not vary within the method is not among its values
        trial_ids = set(setting.trial_ids.values())
        value = next((row[axis] for row in comparison.table.to_dict("records") if row["trial_id"] in trial_ids), None)
    return None if is_missing(value) else int(value)  # type: ignore[arg-type]


def _written_ladders(parameters: Mapping[str, str], label: str) -> set[str]:
    """Dotted paths of a method's axes that the recorded experiment writes as ladders."""
    for_all = {
        key.removeprefix("grid.") for key, text in parameters.items() if key.startswith("grid.") and _is_ladder(text)
    }
    own: dict[str, bool] = {}
    for block in _parsed(parameters.get("methods", "")) or []:
        if (block.get("label") or block.get("name")) == label:
            for key, values in block.get("grid", {}).items():
                path = f"training.{key}" if key in METHOD_TRAINING_KEYS else f"method.{key}"
                own[path] = own.get(path, False) or isinstance(values, dict)
    return {path for path, is_ladder in own.items() if is_ladder} | (for_all - own.keys())


def _is_ladder(text: str) -> bool:
    return isinstance(_parsed(text), dict)


def _parsed(text: str) -> Any:
    """The value of a recorded parameter; None if MLflow cut the text."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _takes_fractions(method: str, path: str) -> bool:
    """Whether the key accepts fractions; False if the method is not installed."""
    section, _, name = path.partition(".")
    if path == EPOCHS:  # of which more cost more and teach more, as more steps do
        return False
    if section == "training" and name in TrainingConfig.model_fields:
        declared = TrainingConfig.model_fields[name].annotation
    elif section == "method" and _is_installed(method):
        declared = hyperparameter_types(method).get(name)
    else:
        return False
    return float in (declared, *get_args(declared))


def default_setting(settings: Sequence[Setting], best: Setting, axes: Mapping[str, str], method: str) -> Setting | None:
    """The setting with the default value on every axis that differs among `settings`.

    None if it is not among them, or if there is a single setting. axes: name -> dotted path. method: the method's name.
    Defaults are those of the installed method and of `training`. An axis without a default (steps) keeps the value of
    `best`.
    """
    if len(settings) == 1:
        return None
    wanted = dict(best.values)
    for axis in best.values:
        if any(setting.values[axis] != best.values[axis] for setting in settings):
            known, value = _default_value(method, axes[axis])
            wanted[axis] = value if known else wanted[axis]
    return next((setting for setting in settings if setting.values == wanted), None)


def _without(values: Mapping[str, Scalar], axis: str) -> dict[str, Scalar]:
    return {name: value for name, value in values.items() if name != axis}


def _is_installed(method: str) -> bool:
    """Whether the method is installed; an old record can hold a method that was removed."""
    import loragrid_methods  # imports torch, which a comparison without axes of methods must not need

    return method in loragrid_methods.method_names()


def _default_value(method: str, path: str) -> tuple[bool, Scalar]:
    """(Whether the key has a default, the default as it is recorded)."""
    section, _, name = path.partition(".")
    if section == "training" and name in TrainingConfig.model_fields:
        info = TrainingConfig.model_fields[name]
        has_default = not info.is_required() and name not in LENGTH_KEYS
        return (True, info.default) if has_default else (False, None)
    if section != "method":
        return False, None
    if not _is_installed(method):
        return False, None
    import loragrid_methods

    value = loragrid_methods.get_method(method).defaults().get(name, dataclasses.MISSING)
    if value is dataclasses.MISSING:
        return False, None
    return True, ",".join(map(str, value)) if isinstance(value, tuple) else value
