"""A method's hyperparameters are read from its source if it is plain; otherwise the method is imported."""

from pathlib import Path

import pytest

import loragrid_methods
from loragrid.config.method_source import declared_types

HEAD = '"""A method."""\nfrom dataclasses import dataclass, field\nfrom typing import ClassVar, Literal\n'
CONTRACT = "from loragrid_methods.stacks.contract import Method\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are methods, too."""
    monkeypatch.setattr(loragrid_methods, "__path__", [*loragrid_methods.__path__, str(tmp_path)])
    return tmp_path


def write(folder: Path, name: str, *lines: str, imports: str = CONTRACT) -> str:
    (folder / f"{name}.py").write_text(HEAD + imports + "\n".join(lines), encoding="utf-8")
    return name


def test_fields_of_plain_types_are_read_in_order(folder: Path) -> None:
    lines = (
        "class Stack(object): pass",
        "class Plain(Method):",
        "    packable: ClassVar[bool] = False",
        "    rank: int = 8",
        "    mode: Literal['a', 'b'] = 'a'",
        "    names: str | tuple[str, ...] = ('q', 'v')",
        "    offset: float | None = -1.0",
    )
    types = declared_types(write(folder, "plain_one", *lines))
    assert types is not None
    assert list(types) == ["rank", "mode", "names", "offset"]
    assert types["names"] == str | tuple[str, ...]
    assert types["offset"] == float | None


def test_fields_of_another_methods_file_are_inherited(folder: Path) -> None:
    lines = (
        "class ScaledStack(LoRAStack): pass",
        "class Scaled(LoRA):",
        "    scale: float = 1.0",
        "    rank: float = 2.0",
    )
    imports = "from loragrid_methods.lora import LoRA, LoRAStack\n"
    types = declared_types(write(folder, "scaled_one", *lines, imports=imports))
    assert types is not None
    targets = ["target_modules", "layers_to_transform", "layers_pattern", "exclude_modules"]
    assert list(types) == ["rank", "alpha", "dropout", "rslora", "scale", *targets]
    assert types["rank"] is float


@pytest.mark.parametrize(
    ("name", "lines"),
    {
        "no_method": ("class Other(object):", "    rank: int = 8"),
        "two_methods": ("class One(Method): pass", "class Two(Method): pass"),
        "two_bases": ("class Mixed(Method, dict):", "    rank: int = 8"),
        "quoted_type": ("class Quoted(Method):", "    rank: 'int' = 8"),
        "own_type": ("class Rank(int): pass", "class Own(Method):", "    rank: Rank = 8"),
        "made_default": ("class Made(Method):", "    rank: int = field(default=8, init=False)"),
        "no_default": ("class Bare(Method):", "    rank: int"),
        "called_type": ("class Called(Method):", "    rank: exit() = 8"),
    }.items(),
)
def test_a_file_that_is_not_plain_needs_an_import(folder: Path, name: str, lines: tuple[str, ...]) -> None:
    assert declared_types(write(folder, name, *lines)) is None
