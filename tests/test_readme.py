"""What the README shows is what the project holds: its examples, its experiment file, its files."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from loragrid import experiment_from_mapping
from loragrid.trials.expand import expand
from loragrid_methods import method_names
from tests.support import custom_sweeps

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("function", [custom_sweeps.search_with_optuna, custom_sweeps.stop_early_with_asha])
def test_the_custom_sweeps_are_the_tested_ones(function: object) -> None:
    source = re.sub(r'    """.*?"""\n', "", inspect.getsource(function))  # type: ignore[arg-type]
    assert source in README


def test_the_experiment_file_in_the_readme_is_a_valid_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    experiment = experiment_from_mapping(yaml.safe_load(text), source="README.md")
    assert len(expand(experiment)) == (2 + 4 + 2 + 6) * 3


def test_every_method_and_every_experiment_file_is_listed() -> None:
    for name in method_names():
        assert f"`{name}`" in README
    for path in (ROOT / "experiments").iterdir():
        assert f"`{path.name}`" in README


def test_every_link_to_a_file_leads_to_one() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
