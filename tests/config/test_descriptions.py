"""Every key of an experiment file has the description, unit and example that the reference page needs."""

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from loragrid.config.experiment import Experiment, MethodConfig
from loragrid.schema.fields import Section, Unit, allowed_by
from loragrid.tasks.discovery import task_kinds

WITHOUT_UNIT = {"lr", "weight_decay", "clip_norm", "beta1", "beta2", "epsilon", "reduction_factor"} | {
    *("temperature", "top_p", "seed"),
}
"""Numbers without a dimension."""


def sections_of_field(field: FieldInfo) -> Iterator[type[BaseModel]]:
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            yield part


def sections_of(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for field in model.model_fields.values():
        yield from sections_of_field(field)


SECTIONS: list[type[BaseModel]] = [Experiment, *dict.fromkeys(sections_of(Experiment)), *task_kinds().values()]
KEYS = [
    pytest.param(section, key, id=f"{section.__name__}.{key}") for section in SECTIONS for key in section.model_fields
]


def is_number(field: FieldInfo) -> bool:
    parts = {field.annotation, *get_args(field.annotation)}
    parts |= {part for annotated in parts if get_origin(annotated) is Annotated for part in get_args(annotated)}
    return bool({int, float} & {part for part in parts if isinstance(part, type)})


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_key_has_a_description_and_examples_it_accepts(section: type[BaseModel], key: str) -> None:
    field = section.model_fields[key]
    assert field.description, "a sentence"
    assert field.description[0].isupper()
    assert field.description.endswith(".")
    if key == "task" or (list(sections_of_field(field)) and key != "methods"):
        return  # the section's own keys have examples
    assert field.examples
    hint = get_type_hints(section, include_extras=True)[key]
    for example in field.examples:
        plain = tuple(example) if isinstance(example, list) else example
        if key not in ("grid", "methods"):  # what needs the method is checked with the whole experiment
            TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(plain)


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_number_has_a_unit_or_no_dimension(section: type[BaseModel], key: str) -> None:
    field = section.model_fields[key]
    if is_number(field):
        assert any(isinstance(entry, Unit) for entry in field.metadata) != (key in WITHOUT_UNIT)
        assert allowed_by(field.metadata)


def test_the_examples_of_methods_and_grids_make_an_experiment() -> None:
    fields = Experiment.model_fields
    whole: dict[str, Any] = {"name": "all", "model": {"name": "m"}, "data": {"name": "d"}, "training": {"steps": 20}}
    for methods in fields["methods"].examples or ():
        for grid in fields["grid"].examples or ():
            assert Experiment.model_validate(whole | {"methods": methods, "grid": grid}).grid
    for grid in MethodConfig.model_fields["grid"].examples or ():
        assert Experiment.model_validate(whole | {"methods": [{"name": "lora", "grid": grid}]}).methods


def test_every_section_of_the_file_is_found() -> None:
    assert len(SECTIONS) == 1 + 13 + len(task_kinds())
