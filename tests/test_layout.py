"""The layout that keeps `platform/`, which is also a standard-library module, from breaking Python.

A `platform/__init__.py`, or a stray module beside the package, would shadow the standard library wherever the
repository's root or a source root is on the path: `import uuid` and `import ray` fail, and Ray's workers never start.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = {"platform": "loragrid", "methods": "loragrid_methods"}
NEVER_IN_METHODS = ("ray", "mlflow", "loragrid", "transformers", "peft", "datasets", "pydantic")


def run_python(code: str, *, path: str = "", cwd: Path = ROOT) -> str:
    """What a fresh interpreter in `cwd` prints; `-c` puts `cwd` first on the path, as `python -m` does."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def method_files() -> list[Path]:
    return sorted((ROOT / "methods" / "loragrid_methods").rglob("*.py"))


def imported_packages(source: str) -> set[str]:
    """The top-level packages that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                names.add(str(node.args[0].value).partition(".")[0])
    return names


@pytest.mark.parametrize(("source_root", "package"), SOURCE_ROOTS.items())
def test_a_source_root_holds_its_package_alone(source_root: str, package: str) -> None:
    entries = {entry.name for entry in (ROOT / source_root).iterdir()} - {"__pycache__"}
    assert {name for name in entries if not name.endswith(".egg-info")} == {package}
    assert (ROOT / source_root / package / "py.typed").is_file()


def test_no_test_folder_is_named_platform_or_is_a_package() -> None:
    assert not (ROOT / "tests" / "platform").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_file_at_the_root_shadows_a_module() -> None:
    assert not list(ROOT.glob("*.py"))


@pytest.mark.parametrize("path", ["", "platform:methods", str(ROOT)], ids=["none", "source roots", "repository"])
def test_the_standard_librarys_platform_works_in_the_repository(path: str) -> None:
    code = "import platform, uuid; print(platform.system(), uuid.uuid4().version, platform.__file__)"
    system, version, file = run_python(code, path=path).split(maxsplit=2)
    assert system
    assert version == "4"
    assert not Path(file).is_relative_to(ROOT)


def test_importing_every_method_imports_torch_alone() -> None:
    code = (
        "import sys, loragrid_methods as m\n"
        "methods = [m.get_method(name) for name in m.method_names()]\n"
        "import loragrid_methods.stacks.peft_format, loragrid_methods.stacks.optimizer\n"
        f"print(len(methods), sorted(set({NEVER_IN_METHODS}) & sys.modules.keys()))"
    )
    count, found = run_python(code, path="methods").split(maxsplit=1)
    assert int(count) >= 8
    assert found == "[]"


@pytest.mark.heavy
def test_the_imports_of_every_sweep_process_exclude_models_and_record() -> None:
    code = (
        "import sys, loragrid.sweep.ray_trainer, loragrid.worker.messages\n"
        "print(sorted({'mlflow', 'datasets', 'transformers.modeling_utils'} & sys.modules.keys()))"
    )
    assert run_python(code, path="platform:methods") == "[]"


@pytest.mark.heavy
def test_steps_are_timed_without_what_sweeps_and_their_record_need() -> None:
    code = (
        "import sys, benchmarks.engine_step, benchmarks.data_parallel, benchmarks.data_parallel_worker\n"
        "print(sorted({'datasets', 'mlflow', 'pydantic', 'ray', 'rich', 'typer'} & sys.modules.keys()))"
    )
    assert run_python(code, path="platform:methods") == "[]"


def test_listing_the_methods_works_from_anywhere_on_the_path(tmp_path: Path) -> None:
    code = "import loragrid_methods; print(*loragrid_methods.method_names())"
    names = run_python(code, path=str(ROOT / "methods"), cwd=tmp_path).split()
    assert names == sorted(
        file.stem for file in (ROOT / "methods/loragrid_methods").glob("*.py") if file.stem[0] != "_"
    )


def test_no_method_file_imports_anything_of_the_platform() -> None:
    assert len(method_files()) >= 17
    allowed = {"torch", "loragrid_methods"} | sys.stdlib_module_names
    for file in method_files():
        imported = imported_packages(file.read_text(encoding="utf-8"))
        assert not imported & set(NEVER_IN_METHODS), file
        assert imported <= allowed, file


def test_the_scan_finds_imports_wherever_they_hide() -> None:
    source = "def f():\n    from ray import tune\n    import importlib\n    importlib.import_module('mlflow.client')\n"
    assert imported_packages(source) == {"ray", "importlib", "mlflow"}


def test_every_file_begins_with_what_it_is() -> None:
    for source_root, package in SOURCE_ROOTS.items():
        for file in (ROOT / source_root / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def test_an_unknown_method_is_answered_with_the_names_there_are() -> None:
    from loragrid_methods import get_method

    with pytest.raises(
        ValueError, match=r"unknown method 'lora_pluss'; the methods are .*vera\. Did you mean 'lora_plus'"
    ):
        get_method("lora_pluss")
    with pytest.raises(ValueError, match=r"unknown method 'engine'"):
        get_method("engine")
