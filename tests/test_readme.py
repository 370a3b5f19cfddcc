"""The README agrees with the project: its methods, its experiment, and the documented custom sweeps."""

import inspect
import re

import pytest

from loragrid import experiment_from_mapping
from loragrid.config.yaml_reader import parse_yaml
from loragrid.trials.expand import expand
from loragrid_methods import method_names
from tests.support import custom_sweeps
from tests.support.documents import ROOT, blocks_in

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_PAGE = (ROOT / "docs" / "how_to" / "python.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("function", [custom_sweeps.search_with_optuna, custom_sweeps.stop_early_with_asha])
def test_the_custom_sweeps_in_the_docs_are_the_tested_ones(function: object) -> None:
    source = re.sub(r'    """.*?"""\n', "", inspect.getsource(function))  # type: ignore[arg-type]
    assert source in PYTHON_PAGE


def test_its_experiment_is_the_one_of_the_tutorial() -> None:
    (of_readme, *_), (of_tutorial, *_) = (
        [parse_yaml(block.text, block.place) for block in blocks_in(text, "") if block.language == "yaml"]
        for text in (README, TUTORIAL)
    )
    assert of_readme == of_tutorial
    assert len(expand(experiment_from_mapping(of_readme, source="README.md"))) == 2 * 3


def test_the_larger_experiment_of_the_tutorial_has_42_trials() -> None:
    block = [block for block in blocks_in(TUTORIAL, "tutorial.md") if block.language == "yaml"][-1]
    assert len(expand(experiment_from_mapping(parse_yaml(block.text, block.place), source=block.place))) == 42
    assert "It has 42 trials" in TUTORIAL


def test_its_table_has_one_row_per_method() -> None:
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(method_names())
