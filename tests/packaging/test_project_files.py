"""Licence, changelog, guide, hooks and workflow agree with the code."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pins(path: str) -> dict[str, str]:
    """Package -> version of a constraints file, with names as PyPI compares them."""
    lines = [line for line in read(path).splitlines() if line and not line.startswith("#")]
    return {
        re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in (line.partition("==") for line in lines)
    }


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = read("LICENSE")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert re.search(r"Copyright \d{4} LoraGrid contributors", text)
    assert "[yyyy]" not in text
    assert PROJECT["license"] == "Apache-2.0"


def test_the_hooks_run_the_ruff_of_the_constraints() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert hooks.keys() == {"ruff-format", "ruff-check"}
    for hook in hooks.values():
        assert hook["additional_dependencies"] == [f"ruff=={pins('constraints.txt')['ruff']}"]


def test_the_workflow_runs_everything_on_every_named_python() -> None:
    (job,) = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    assert job["steps"][-1]["run"] == "bash .ci/run"
    assert (ROOT / ".ci" / "run").is_file()
    named = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    assert job["strategy"]["matrix"]["python-version"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_changelog_knows_the_version() -> None:
    text = read("CHANGELOG.md")
    assert "\n## [Unreleased]\n" in text
    assert PROJECT["version"] in text


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_file_that_a_document_links_exists(document: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", read(document)) if not link.startswith("http")]
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_make_target_in_the_guide_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"\bmake (?:[A-Z]+=\S+ )?([a-z][a-z-]*)", read("CONTRIBUTING.md")))
    assert {"demo", "test", "lint", "soak"} <= named
    assert named <= targets


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-lowest.txt"])
def test_every_dependency_of_the_tests_is_pinned(constraints: str) -> None:
    extras = ["test", "lint"] if constraints == "constraints.txt" else ["test"]
    requirements = PROJECT["dependencies"] + [
        entry for extra in extras for entry in PROJECT["optional-dependencies"][extra]
    ]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", entry)[0]).lower() for entry in requirements}
    assert names <= pins(constraints).keys()
