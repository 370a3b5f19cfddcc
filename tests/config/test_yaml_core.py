"""YAML 1.2's core schema, read and written: a plain value has one meaning, and what has two is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from loragrid.comparison.experiment_file import experiment_to_yaml
from loragrid.config.experiment import Experiment
from loragrid.config.yaml_core import CoreDumper, load_document
from loragrid.config.yaml_reader import parse_yaml, read_yaml
from loragrid.schema.errors import ExperimentError
from loragrid.trials.load import experiment_from_mapping

# The YAML 1.2.2 specification, examples 10.8 and 10.9 and the table of section 10.3.2.
SPECIFICATION: list[tuple[str, object]] = [
    ("null", None),
    ("Null", None),
    ("NULL", None),
    ("~", None),
    *((word, True) for word in ("true", "True", "TRUE")),
    *((word, False) for word in ("false", "False", "FALSE")),
    ("0", 0),
    ("0o7", 7),
    ("0x3A", 58),
    ("-19", -19),
    ("0.", 0.0),
    ("-0.0", -0.0),
    (".5", 0.5),
    ("+12e03", 12000.0),
    ("-2E+05", -200000.0),
    (".inf", math.inf),
    ("-.Inf", -math.inf),
    ("+.INF", math.inf),
    ("1e-3", 1e-3),
    ("1.", 1.0),
    ("+1", 1),
    ("007", 7),
    ("010", 10),
    ("-010", -10),
    ("09", 9),
    ("0x10", 16),
    ("1e3", 1000.0),
]
TEXTS = [
    "1_000",
    "1:30",
    "20:30:40.5",
    "0b11",
    "-0x10",
    "0o8",
    "0O7",
    "0X1F",
    "0x",
    "yes",
    "No",
    "on",
    "OFF",
    "y",
    "n",
    "tRUE",
    "nULL",
    "nan",
    "inf",
    ".Nan",
    "+.nan",
    "2001-12-14",
    "2001-12-14t21:59:43.10-05:00",
    "=",
    "1e",
    "1e3.5",
    ".",
    "+",
    "-.",
    "1 000",
    "1,000",
    "٣",
]
"""Plain values that are text in YAML 1.2, although YAML 1.1, Python or JSON reads some of them as something else."""


@pytest.mark.parametrize(("written", "value"), SPECIFICATION)
def test_plain_values_are_those_of_the_specification(written: str, value: object) -> None:
    for text in (written, f"{{a: {written}}}", f"[{written}]", f"a:\n  - {written}\n"):
        found = load_document(text)
        while isinstance(found, list | dict):
            (found,) = found.values() if isinstance(found, dict) else found
        assert (type(found), repr(found)) == (type(value), repr(value))


def test_not_a_number_is_a_float() -> None:
    assert all(math.isnan(value) for value in load_document("[.nan, .NaN, .NAN]"))


@pytest.mark.parametrize("text", TEXTS)
def test_everything_else_is_text(text: str) -> None:
    assert load_document(f"a: {text}") == {"a": text}


@pytest.mark.parametrize("text", [*TEXTS, *(written for written, _ in SPECIFICATION), "", "<<", "# a", " a ", "a: b"])
def test_both_versions_of_yaml_read_a_written_text_as_text(text: str) -> None:
    written = yaml.dump({"a": text, text: ["b", text]}, Dumper=CoreDumper, allow_unicode=True)
    assert load_document(written) == yaml.safe_load(written) == {"a": text, text: ["b", text]}


@pytest.mark.parametrize("value", [0, -8, 10**20, 1e-5, 1e300, 0.1, -0.0, 1000.0, True, False, None, "a", [1, "1"]])
def test_other_values_are_read_back_with_their_type(value: object) -> None:
    for written in (yaml.dump({"a": value}, Dumper=CoreDumper), yaml.safe_dump({"a": value})):
        assert repr(load_document(written)) == repr({"a": value})


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("0o8", "1e")])
def test_the_file_of_an_older_sweep_has_the_same_values(text: str) -> None:
    # Older versions wrote with PyYAML's own dumper, which quotes what YAML 1.1 takes for something else.
    assert load_document(yaml.safe_dump({"a": text, "b": 0.001}, allow_unicode=True)) == {"a": text, "b": 0.001}


@pytest.mark.parametrize("text", ["010", "1:30", "yes", "1e3", "0o7", "null", "2001-12-14", "1_000", ".5", "true"])
def test_an_experiment_keeps_texts_that_look_like_numbers(text: str) -> None:
    experiment = Experiment(
        name="kept",
        question=text,
        model={"name": text},
        data={"name": "chitchat", "columns": {"prompt": text}},
        training={"steps": 3, "batch_size": 4, "lr": 1e-5},
        methods=[{"name": "lora", "label": "LoRA 1e3"}],
        grid={"model.name": [text, "other"]},
    )
    again = experiment_from_mapping(parse_yaml(experiment_to_yaml(experiment), "kept"), "kept")
    assert again == experiment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nconfirm:\n", "line 2: not valid YAML: the key 'confirm' has no value: write one, null, or {}"),
        ("a: {b: }", "line 1: not valid YAML: the key 'b' has no value"),
        ("a:\n- 1\n-\n- 2\n", "a list has an entry without a value"),
        ("a: 1\n<<: {b: 1}\n", "line 2: not valid YAML: YAML 1.2 has no merge keys"),
        ("a: !!int 1:30", "'1:30' is not a value of the tag !!int in YAML 1.2"),
        ("a: !!bool yes", "'yes' is not a value of the tag !!bool"),
        ("a: !!timestamp 2001-12-14", "the tag !!timestamp is not allowed: write plain values"),
        ("a: !!binary aGk=", "the tag !!binary is not allowed"),
        ("a: !!set {b}", "the tag !!set is not allowed"),
        ("a: !!omap [b: 1]", "the tag !!omap is not allowed"),
        ("a: !mine b", "the tag !mine is not allowed"),
        ("a: 1\nb: 1e400\n", "line 2: not valid YAML: 1e400 is too large for a 64-bit number"),
        ("a: -1e400\n", "too large"),
        ("a: 1e-400", "1e-400 is too small for a 64-bit number, which would make it 0"),
        ("seed: [1,000]", "1,000 is not one number, because a comma separates the entries of a list"),
        ("lr: [0,001, 0,002]", "0,001 is not one number"),
        ("a: {lr: 0,001}", "0,001 is not one number, because a comma separates the keys in braces"),
        ("a: {lr: -1,5, b: 2}", "-1,5 is not one number"),
        ("a: {steps: 1,000,000}", "1,000 is not one number"),
        ("a: {lr: 1,5e-4}", "1,5e-4 is not one number"),
        ("{a: 1.000,5}", "1.000,5 is not one number"),
        ("a: {q: Yes, or no, b: 1}", "the value 'Yes' ends at its comma, because a comma separates the keys in braces"),
        ("a: {q: b,c}", "put a text that holds a comma in quotes"),
        ("a: {b: 1, c: }", "the key 'c' has no value: put a text"),
        ("a: {b: 'c', d}", "the key 'd' has no value: write one"),
        ("a:\n  b: 1\n  c:\n", "the key 'c' has no value: write one"),
        ("a: " + "9" * 5000, "line 1: not valid YAML: a number of 5000 digits is too large"),
        ("010: a", "line 1: not valid YAML: the key '010' is not text"),
        ("%YAML 1.1\n---\na: 010\n", "declares YAML 1.1, and experiment files are YAML 1.2"),
    ],
)
def test_a_value_that_would_change_its_meaning_is_refused(text: str, message: str) -> None:
    with pytest.raises(ExperimentError) as refused:
        parse_yaml(text, "file.yaml")
    assert message in str(refused.value)


@pytest.mark.parametrize("text", ["!!int 010", "!!int '10'", '!!str "10"', "%YAML 1.2\n---\n10", "'10'", "10.0"])
def test_tags_and_quotes_decide_the_type(text: str) -> None:
    expected: Any = 10 if "int" in text or text.endswith("\n10") else 10.0 if text == "10.0" else "10"
    assert repr(load_document(text)) == repr(expected)


def test_a_list_without_blanks_is_a_list_of_numbers() -> None:
    assert load_document("[007,010]") == [7, 10]
    assert load_document("[1,2,300]") == [1, 2, 300]
    assert load_document("[1, 000]") == [1, 0]


def test_a_file_runs_the_seeds_that_stand_in_it(tmp_path: Path) -> None:
    (tmp_path / "seeds.yaml").write_text("grid: {seed: [007, 010, 0x10]}", encoding="utf-8")
    assert read_yaml(tmp_path / "seeds.yaml") == {"grid": {"seed": [7, 10, 16]}}


def test_numbers_of_numpy_are_kept_as_plain_numbers() -> None:
    experiment = Experiment(
        name="kept",
        model={"name": "m"},
        data={"name": "chitchat"},
        training={"steps": 3, "batch_size": 4},
        methods=[{"name": "lora", "alpha": np.float64(8), "grid": {"lr": list(np.logspace(-4, -2, 3))}}],
        grid={"training.weight_decay": [np.float64(0.1), 0.0]},
    )
    assert {type(value) for value in experiment.grid["training.weight_decay"]} == {float}
    assert experiment_from_mapping(parse_yaml(experiment_to_yaml(experiment), "kept"), "kept") == experiment
