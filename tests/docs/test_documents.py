"""The documents show only what works: valid experiments, existing commands and options, public Python names."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import loragrid as lg
from docs.generate.collect import EXAMPLES_PAGE, GENERATED, collect
from docs.generate.command_line import commands
from loragrid.config.yaml_reader import parse_yaml
from loragrid.trials.expand import expand
from tests.support.documents import ROOT, Block, blocks, command_lines, documents, spans, with_minimal

OTHER_PROGRAMS = {"ray", "export", ".", "pip", "git", "cd", "zensical", "pre-commit", "python3"}
"""What the documents call beside `make`, `loragrid` and Python modules of the repository."""


def parse_command(words: list[str]) -> None:
    """Parse `loragrid ...` as the command line does, without running it; raises what the parser raises."""
    if not words or words[0].startswith("-"):
        assert set(words) <= {"--help", "-h", "--version"}
        return
    command = commands()[words[0]]
    if set(words[1:]) & {"--help", "-h"}:
        return
    command.make_context(words[0], list(words[1:]))


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.place)
def test_yaml_blocks_are_valid_experiments(block: Block) -> None:
    fragment = parse_yaml(block.text, block.place)
    expand(lg.experiment_from_mapping(with_minimal(fragment), block.place))


def test_yaml_blocks_that_are_wrong_are_found() -> None:
    with pytest.raises(lg.ExperimentError, match="rnak"):
        lg.experiment_from_mapping(with_minimal({"grid": {"method.rnak": [4]}}), "test")


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.place)
def test_shell_blocks_name_commands_options_targets_and_paths_that_exist(block: Block) -> None:
    for words in command_lines(block.text):
        check_command(words)


def check_command(words: list[str]) -> None:
    """Check one command; a program that is not known here is an error, so that none goes unchecked."""
    while re.match(r"[A-Z_]+=", words[0]):  # a variable before the command
        words = words[1:]
    if words[0] == "ray" and "--" in words:
        check_command(words[words.index("--") + 1 :])
    if words[:3] == ["python", "-m", "loragrid"]:
        words = words[2:]
    if words[0] == "loragrid":
        parse_command(words[1:])
    elif words[0] == "make":
        check_make(words[1:])
    elif words[:2] == ["python", "-m"]:
        module = ROOT / words[2].replace(".", "/")
        assert (
            module.with_suffix(".py").is_file() or (module / "__main__.py").is_file() or words[2] in ("pytest", "pip")
        )
    else:
        assert words[0] in OTHER_PROGRAMS, words
    for word in words[1:]:
        if (ROOT / word.partition("/")[0]).is_dir() and "/" in word and not word.startswith((".", "build/", "site/")):
            assert (ROOT / word).exists(), word


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in words:
        assert "=" in word or word in targets, f"make {word}"


@pytest.mark.parametrize(
    "words", [["run", "x.yaml", "--no-such-option"], ["report", "mine"], ["no-such-command"], ["export", "--to", "x"]]
)
def test_commands_that_are_wrong_are_found(words: list[str]) -> None:
    with pytest.raises((Exception, SystemExit)):  # click's errors, wherever this typer keeps them
        parse_command(words)


def test_commands_in_running_text_exist() -> None:
    checked = 0
    for place, span in spans():
        words = span.split()
        if words[0] == "make" and len(words) > 1:
            check_make(words[1:])
            checked += 1
        elif words[0] == "loragrid" and len(words) > 1 and words[1].isalpha() and words[1].islower():
            assert words[1] in commands(), f"{place}: {span}"
            known = {name for parameter in commands()[words[1]].params for name in parameter.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= known | {"--help"}, f"{place}: {span}"
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.place)
def test_python_blocks_call_public_names_with_arguments_that_they_take(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lg":
            assert node.attr in lg.__all__, node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func
            if isinstance(name.value, ast.Name) and name.value.id == "lg":
                keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                inspect.signature(getattr(lg, name.attr)).bind(*node.args, **keywords)


@pytest.mark.parametrize(
    "block", [block for block in blocks("python") if "lg.run(" in block.text], ids=lambda block: block.place
)
def test_python_blocks_describe_experiments_that_could_run(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[lg.Experiment] = []

    class Result:
        def to_pandas(self) -> None: ...

    def run(experiment: lg.Experiment) -> Result:
        described.append(experiment)
        return Result()

    monkeypatch.setattr(lg, "run", run)
    exec(compile(block.text, block.place, "exec"), {})
    assert [len(expand(experiment)) for experiment in described] == [4]


def test_links_lead_to_files_or_to_pages_that_are_generated(tmp_path: Path) -> None:
    generated = {ROOT / "docs" / name for name in (*GENERATED, EXAMPLES_PAGE)}
    for path in documents():
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not link.startswith(("http", "mailto:", "#")):
                target = (path.parent / link.partition("#")[0]).resolve()
                assert target.exists() or target in generated, f"{path.relative_to(ROOT)}: {link}"
    collect(ROOT, tmp_path / "docs")
    assert (tmp_path / "docs" / "index.md").is_file()


def test_no_document_claims_to_be_the_first_or_only_one() -> None:
    for path in documents():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bthe (first|only) (tool|project|library|framework|one that)\b", text, re.IGNORECASE), (
            path
        )
