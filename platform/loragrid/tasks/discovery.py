"""Finds the task kinds, one per file of `tasks/kinds`, and reads the `task:` section of an experiment."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from loragrid.schema.errors import ExperimentError, Problem, problems_of, what_is_wrong
from loragrid.tasks import kinds
from loragrid.tasks.contract import Figure, TaskConfig


def task_kinds() -> Mapping[str, type[TaskConfig]]:
    """Kind -> its `TaskConfig`, for every file in `tasks/kinds`, in alphabetical order."""
    return _kinds_in(tuple(kinds.__path__))


def task_figures() -> tuple[Figure, ...]:
    """All figures of all kinds, each once; those that rank trials come first."""
    by_rank = [(place, figure) for kind in task_kinds().values() for place, figure in enumerate(kind.figures)]
    found: dict[str, Figure] = {}
    for _, figure in sorted(by_rank, key=lambda entry: entry[0]):
        assert found.setdefault(figure.name, figure) == figure, f"two kinds have different figures named {figure.name}"
    return tuple(found.values())


def figure_of(metric: str) -> Figure | None:
    """The figure behind a metric key such as `eval/accuracy`; None for a key that no kind computes."""
    split, _, name = metric.partition("/")
    if split not in ("eval", "test"):
        return None
    return next((figure for figure in task_figures() if figure.name == name), None)


def read_task(section: Any) -> TaskConfig:
    """The `task:` section with the keys of its kind; a key of another kind is accepted only with its default.

    Raises:
        ExperimentError: naming key, value and what is allowed.
    """
    if isinstance(section, TaskConfig):  # built in Python, so already checked
        return section
    known = task_kinds()
    if not isinstance(section, Mapping):
        keys = dict.fromkeys(key for kind in known.values() for key in kind.model_fields)
        allowed = f"a mapping with the keys {', '.join(keys)}"
        raise ExperimentError([Problem(key="", value=section, what=what_is_wrong(section, allowed), allowed=allowed)])
    allowed = ", ".join(known)
    if "kind" not in section:
        raise ExperimentError([Problem(key="kind", what="is missing", allowed=allowed)])
    name = section["kind"]
    if not isinstance(name, str) or name not in known:
        raise ExperimentError([Problem(key="kind", value=name, what=what_is_wrong(name, allowed), allowed=allowed)])
    own, problems = dict(section), []
    for key in [key for key in section if key not in known[name].model_fields]:
        owners = {other: kind.model_fields[key] for other, kind in known.items() if key in kind.model_fields}
        if owners:
            value = own.pop(key)
            if not any(_is_default(value, field.default) for field in owners.values()):
                names = ", ".join(owners)
                what = f"belongs to kind: {names}, and has no effect with {name}"
                problems.append(Problem(key=key, value=value, what=what, allowed=f"kind: {names}, or no {key}"))
    try:
        task = known[name].model_validate(own)
    except ValidationError as error:
        raise ExperimentError([*problems, *problems_of(error, known[name])]) from None
    if problems:
        raise ExperimentError(problems)
    return task


AnyTask = Annotated[SerializeAsAny[TaskConfig], BeforeValidator(read_task)]
"""The type of the `task:` section in an experiment."""


def _is_default(value: object, default: object) -> bool:
    return value == default and isinstance(value, bool) == isinstance(default, bool)


@cache
def _kinds_in(folders: tuple[str, ...]) -> Mapping[str, type[TaskConfig]]:
    names = sorted(module.name for module in pkgutil.iter_modules(folders) if not module.ispkg)
    return {name: _kind_of(name) for name in names}


def _kind_of(name: str) -> type[TaskConfig]:
    module = importlib.import_module(f"{kinds.__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, TaskConfig) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one TaskConfig, not {len(found)}"
    kind: type[TaskConfig] = found[0]
    assert kind.model_fields["kind"].default == name, f"{module.__name__}: kind must be {name!r}, as the file is named"
    return kind
