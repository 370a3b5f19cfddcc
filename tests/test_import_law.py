"""The code obeys the import law in pyproject.toml, and the check reports a planted forbidden import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("platform", "methods")


def lint_imports(root: Path) -> "subprocess.CompletedProcess[str]":
    """Run import-linter on the packages below `root`, with the contracts of its pyproject.toml."""
    path = os.pathsep.join(str(root / source_root) for source_root in SOURCE_ROOTS)
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sources and of the law."""
    for source_root in SOURCE_ROOTS:
        shutil.copytree(ROOT / source_root, tmp_path / source_root, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_tree_keeps_the_import_law() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "law"),
    [
        ("platform/loragrid/config/experiment.py", "import loragrid.trials.trial", "only rooms below it"),
        ("platform/loragrid/training/loop.py", "from loragrid.worker import queue", "only rooms below it"),
        ("platform/loragrid/formatting.py", "from loragrid.config.experiment import Experiment", "only rooms below it"),
        ("platform/loragrid/trials/trial.py", "import loragrid.models.loading", "only rooms below it"),
        ("platform/loragrid/worker/main.py", "import loragrid", "imports the facade"),
        ("platform/loragrid/report/charts.py", "from loragrid import run", "imports the facade"),
        ("platform/loragrid/trials/imported_by_none.py", "import loragrid", "imports the facade"),
        ("methods/loragrid_methods/lora.py", "import loragrid.config.experiment", "the methods know no platform"),
        ("methods/loragrid_methods/lora.py", "import transformers", "the methods know no platform"),
    ],
)
def test_an_import_against_the_law_is_refused(copy: Path, file: str, line: str, law: str) -> None:
    with (copy / file).open("a", encoding="utf-8") as module:
        module.write(f"\n\ndef _planted() -> None:\n    {line}\n")
    done = lint_imports(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(law in text for text in broken), done.stdout


def test_a_room_that_the_law_does_not_name_is_refused(copy: Path) -> None:
    (copy / "platform" / "loragrid" / "attic").mkdir()
    (copy / "platform" / "loragrid" / "attic" / "__init__.py").write_text("", encoding="utf-8")
    done = lint_imports(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "attic" in done.stdout + done.stderr
