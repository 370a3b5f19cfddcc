"""Where a chosen setting stands among those tried: at the end of a ladder, and against the untuned default."""

import dataclasses
from collections.abc import Mapping, Sequence

from loragrid.config_sections import TrainingConfig
from loragrid.settings import Setting
from loragrid.tracking import Scalar


def edge_sides(best: Setting, tried: Sequence[Setting]) -> dict[str, str]:
    """Axis -> lowest or highest, where the best value stands at an end of those tried with all other values equal.

    A ladder is an axis with fractional values (learning rates and their ratios, scalings, decays): too little and too
    much of them both hurt, so that a best value at the end says that the ladder was too short. Whole-numbered axes
    (rank, steps, batch size) buy quality with cost: their best value is expected at an end. Nothing lies below 0.
    """
    sides: dict[str, str] = {}
    for axis, value in best.values.items():
        others = _without(best.values, axis)
        beside = [setting.values[axis] for setting in tried if _without(setting.values, axis) == others]
        ladder = [own for own in beside if isinstance(own, float)]
        if len(ladder) > 1 and value != 0 and value in (min(ladder), max(ladder)):
            sides[axis] = "lowest" if value == min(ladder) else "highest"
    return sides


def default_setting(settings: Sequence[Setting], best: Setting, axes: Mapping[str, str], method: str) -> Setting | None:
    """The setting with the default on every axis that differs among `settings`; None where there is none, or no choice.

    axes: name -> dotted path. method: its name, by which its class is found. The default is the method's, as it is
    installed, or that of `training`; an axis without one (steps) keeps the value of `best`.
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


def _default_value(method: str, path: str) -> tuple[bool, Scalar]:
    """Whether the key has a default, and the default as a record writes it."""
    section, _, name = path.partition(".")
    if section == "training" and name in TrainingConfig.model_fields:
        info = TrainingConfig.model_fields[name]
        return (False, None) if info.is_required() else (True, info.default)
    if section != "method":
        return False, None
    import loragrid_methods  # it imports torch, which a comparison without axes of methods must not need

    if method not in loragrid_methods.method_names():  # a record can hold one that is no longer installed
        return False, None
    value = loragrid_methods.get_method(method).defaults().get(name, dataclasses.MISSING)
    if value is dataclasses.MISSING:
        return False, None
    return True, ",".join(value) if isinstance(value, tuple) else value
