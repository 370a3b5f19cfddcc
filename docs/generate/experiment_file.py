"""The reference of every key of an experiment file, made from the pydantic models that check it."""

import json
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from docs.generate.markdown import MissingDescriptionError, fenced, page, plain, table
from loragrid.config.experiment import METHOD_TRAINING_KEYS, Experiment, MethodConfig
from loragrid.schema.fields import Section, Unit, allowed_by
from loragrid.tasks.contract import TaskConfig
from loragrid.tasks.discovery import task_kinds

INTRODUCTION = """
An experiment is one YAML file. Unknown keys and impossible values are refused before anything starts; the message
names the file, the key, the value and what is allowed.

Each example below is a part of an experiment file. `--set KEY=VALUE` changes a key on the command line, with the
dotted name that this page uses: `--set training.steps=50`.

## How values are read

A file, and each value of `--set`, is read as YAML 1.2 (core schema), and no value has two meanings:

* `true` and `false` are the only switches, and `null` or `~` is the only way to write no value. `yes`, `no`, `on` and
  `off` are text. A key without a value is refused.
* `10`, `010`, `0xA` and `0o12` are the whole number ten. `10.0` and `1e1` are not whole numbers; `1e-3`, `.5` and `1.`
  are numbers. `1_000`, `1:30`, `0b11` and dates are text, and a key that takes a number refuses them.
* A text that looks like a number, `true` or `null` must be in quotes: `revision: "0123456"`.
* In a path, `~` is the home folder, and a relative path starts at the folder in which the command runs. Nothing else is
  replaced: `$HOME`, `%TEMP%`, `C:\\data` and `file:///data` are refused.
* Repeated keys, aliases, merge keys (`<<`), tags such as `!!python`, and numbers too large or too small for 64 bits are
  refused with their line.
"""

METHOD_KEYS = f"""
An entry of `methods:` is the name of a method, or a mapping. Beside the keys below, the mapping takes the
hyperparameters of the method ([all methods](methods.md)) and its own value for these training keys:
{", ".join(f"`{key}`" for key in METHOD_TRAINING_KEYS)}.
"""

GRID_NOTES = """
A list is an axis only inside a `grid:` block. A value that a method sets for itself wins over the axis of the
experiment. `{ladder: [LOWEST, HIGHEST], points: N}` stands for N values with equal ratios between them.
Keys that decide only what is observed or what is held at once (such as `training.eval_every` or
`training.micro_batch_size`) cannot be an axis.
"""


def experiment_file_page() -> str:
    """The page, in Markdown.

    Raises:
        MissingDescriptionError: a field of a model has no description, or a key that is no section has no example.
    """
    plain_keys: list[str] = []
    sections: list[str] = []
    for name, field in Experiment.model_fields.items():
        model = section_of(field.annotation)
        if name == "methods":
            sections += ["## methods", _described("methods", field), METHOD_KEYS, *_keys("methods", MethodConfig)]
        elif model is not None:
            need = "This section is required." if field.is_required() else "This section is optional."
            sections += [f"## {name}", f"{_described(name, field)} {need}"]
            sections += _task_keys() if model is TaskConfig else [_more_about(model), *_keys(name, model)]
        else:
            plain_keys.append(_key(name, name, field))
            plain_keys += [GRID_NOTES] if name == "grid" else []
    return page("Experiment file", INTRODUCTION, ["## Top level", *plain_keys, *sections])


def section_of(annotation: Any) -> type[Section] | None:
    """The model of a key that is a section; None for a key that holds a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return next((model for part in get_args(annotation) if (model := section_of(part))), None)
    return None


def keys_with_fields() -> Iterator[tuple[str, type[Section], str, FieldInfo]]:
    """Section ("" for the top level), its model, key and field of every key of an experiment file."""
    for name, field in Experiment.model_fields.items():
        model = MethodConfig if name == "methods" else section_of(field.annotation)
        if model is None:
            yield "", Experiment, name, field
        elif model is TaskConfig:
            for kind in task_kinds().values():
                yield from ((name, kind, key, inner) for key, inner in kind.model_fields.items())
        else:
            yield from ((name, model, key, inner) for key, inner in model.model_fields.items())


def _own_fields(kind: type[TaskConfig]) -> dict[str, FieldInfo]:
    return {key: field for key, field in kind.model_fields.items() if key not in TaskConfig.model_fields}


def example_of(section: str, model: type[Section], key: str, value: object) -> dict[str, Any]:
    """The part of an experiment file that sets one key, with the keys that its section cannot do without."""
    if not section:
        return {key: value}
    required = {
        name: field.examples[0]
        for name, field in model.model_fields.items()
        if field.is_required() and field.examples and name != key
    }
    if issubclass(model, TaskConfig) and key != "kind":
        required["kind"] = model.model_fields["kind"].default
    block = {**required, key: value}
    return {section: [block] if section == "methods" else block}


def _task_keys() -> list[str]:
    """The keys of every task, and those of each kind."""
    kinds = task_kinds()
    rows = [(f"`{name}`", _described("task.kind", kind.model_fields["kind"])) for name, kind in kinds.items()]
    parts = ["### `task.kind` { #task-kind }", "What is scored. It is required.", table(["kind", "meaning"], rows)]
    parts.append(fenced("yaml", f"task: {{kind: {next(iter(kinds))}}}"))
    first = next(iter(kinds.values()))
    shared = [key for key in TaskConfig.model_fields if key != "kind"]
    parts += [_key(f"task.{key}", key, first.model_fields[key], "task", first) for key in shared]
    for name, kind in kinds.items():
        parts.append(f"## task, kind: {name} {{ #task-{name} }}")
        parts.append(" ".join((kind.__doc__ or "").split()))
        parts += [_key(f"task.{key}", key, field, "task", kind, name) for key, field in _own_fields(kind).items()]
    return parts


def _more_about(model: type[Section]) -> str:
    """A model's documentation without its first paragraph, which is the section's description again."""
    return "\n\n".join(" ".join(part.split()) for part in (model.__doc__ or "").split("\n\n")[1:])


def _keys(section: str, model: type[Section]) -> list[str]:
    return [_key(f"{section}.{name}", name, field, section, model) for name, field in model.model_fields.items()]


def _key(
    path: str, name: str, field: FieldInfo, section: str = "", model: type[Section] = Experiment, kind: str = ""
) -> str:
    """One key: its heading, its description, its facts and an example."""
    description = _described(path, field)
    if not field.examples:
        raise MissingDescriptionError(f"{path}: the field has no examples")
    facts = [_type_of(field), _default_of(path, field), *_units_of(field)]
    head = ["type", "default", *(["unit"] if len(facts) == 3 else [])]
    example = fenced("yaml", _yaml(example_of(section, model, name, field.examples[0])))
    anchor = "-".join(part for part in (section, kind, name) if part)
    return "\n\n".join([f"### `{path}` {{ #{anchor} }}", description, table(head, [facts]).strip(), example])


def _described(path: str, field: FieldInfo) -> str:
    if not field.description:
        raise MissingDescriptionError(f"{path}: the field has no description")
    return plain(field.description)


def _type_of(field: FieldInfo) -> str:
    if allowed := allowed_by(field.metadata):
        return allowed
    words: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    annotation = field.annotation
    if get_origin(annotation) is dict:
        return "a mapping"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(
            "null" if part is type(None) else words.get(part, str(part)) for part in get_args(annotation)
        )
    return words.get(annotation, str(annotation))


def _default_of(path: str, field: FieldInfo) -> str:
    if path == "methods.label":
        return "the method's name"
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"


def _units_of(field: FieldInfo) -> list[str]:
    return [entry.text for entry in field.metadata if isinstance(entry, Unit)]


def _yaml(example: dict[str, Any]) -> str:
    # Section keys on lines of their own, what is below them in the short form.
    lines = []
    for key, value in example.items():
        if isinstance(value, str | int | float | bool):
            lines.append(yaml.safe_dump({key: value}, allow_unicode=True, width=100, sort_keys=False).strip())
        else:
            flow = yaml.safe_dump(
                _plain(value), default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False
            )
            lines.append(f"{key}: {flow.strip()}")
    return "\n".join(lines)


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))
