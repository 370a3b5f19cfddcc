"""The public interface: every name in `loragrid.__all__` works, and the documentation uses no other name."""

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import loragrid as lg

ROOT = Path(__file__).resolve().parents[2]
SUBPACKAGES = {module.name for module in pkgutil.iter_modules(lg.__path__)}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", lg.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(lg, name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert inspect.getdoc(value)
    assert name in str(lg.__doc__), "the docstring of the package lists every public name"


def test_the_list_of_public_names_is_sorted_and_whole() -> None:
    assert lg.__all__ == sorted(lg.__all__)
    assert set(lg.__all__) == set(lg._ORIGINS)
    assert set(lg.__all__) <= set(dir(lg))


def test_type_checkers_see_the_same_origins() -> None:
    tree = ast.parse(Path(str(lg.__file__)).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    origins = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert origins == lg._ORIGINS


def test_no_public_name_is_also_a_subpackage() -> None:
    assert "report" in SUBPACKAGES
    assert not set(lg.__all__) & SUBPACKAGES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'loragrid' has no attribute 'runn'"):
        _ = lg.runn


def test_sync_takes_a_storage_folder(tmp_path: Path) -> None:
    assert lg.sync(tmp_path) == lg.sync(str(tmp_path)) == {}
    with pytest.raises(ValueError, match="no such folder"):
        lg.sync(tmp_path / "nowhere")


def test_export_refuses_a_folder_that_exists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        lg.export("lora-1", "sqlite:///nowhere.db", str(tmp_path))


def used_names(code: str) -> Iterator[str]:
    """The names of the package `loragrid` that a piece of Python uses; a private module as `module.name`."""
    tree = ast.parse(code)
    aliases = {"lg"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "loragrid":
                    aliases.add(alias.asname or alias.name)
                elif alias.name.startswith("loragrid."):
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == "loragrid":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("loragrid."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield node.attr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_document_uses_only_public_names(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    used = set(re.findall(r"\blg\.([A-Za-z_]+)", text))
    for code in re.findall(r"^```(?:python|py)\b[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        used |= set(used_names(code))
    assert used <= set(lg.__all__)


def test_the_readme_is_found_to_use_the_package() -> None:
    (code, *_) = re.findall(
        r"^```python\n(.*?)^```", DOCUMENTS[0].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert "run" in set(used_names(code))


def test_private_names_in_code_are_found() -> None:
    code = "import loragrid as x\nfrom loragrid.sweep.run import run\nfrom loragrid import plan\nx.secret()\n"
    assert set(used_names(code)) == {"loragrid.sweep.run.run", "plan", "secret"}
