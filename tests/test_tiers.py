"""The test tiers: the cost limits of unit tests, the tests of each make target, and the tests behind the promises."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loragrid.trials.outcome import SweepOutcome
from tests.support.shared_ray import SharedRay
from tests.support.sweep_results import assert_succeeded
from tests.support.tiers import TIERS

ROOT = Path(__file__).parent.parent
RELIABILITY = ROOT / "docs" / "reliability.md"

TESTS_OF_ALL_COSTS = """
import subprocess, sys, time
import pytest

BURN = "import time\\nend = time.process_time() + 0.4\\nwhile time.process_time() < end: pass"

def test_burns(): exec(BURN, {})
def test_has_a_child_that_burns(): subprocess.run([sys.executable, "-c", BURN], check=True)
def test_sleeps(): time.sleep(0.4)
@pytest.mark.heavy
def test_is_heavy(): exec(BURN, {})
def test_fails(): raise AssertionError("its own reason")
"""


def run_pytest(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run pytest with our conftest.py on the tests in `folder`."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "platform", ROOT / "methods")))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *options, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def outcomes(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    """Name of the test -> PASSED or FAILED."""
    return {name: word for word, name in re.findall(r"^(PASSED|FAILED) \S+::(\w+)", done.stdout, re.MULTILINE)}


def test_a_unit_test_that_burns_cpu_time_fails(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_costs.py").write_text(TESTS_OF_ALL_COSTS, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    heavy: x\n", encoding="utf-8")
    done = run_pytest(tmp_path, "-o", "unit_cpu_seconds=0.3")
    assert outcomes(done) == {
        "test_burns": "FAILED",
        "test_has_a_child_that_burns": "FAILED",
        "test_sleeps": "PASSED",
        "test_is_heavy": "PASSED",
        "test_fails": "FAILED",
    }, done.stdout
    assert done.stdout.count("s of CPU time; allowed: 0.3 s") >= 2
    assert "its own reason" in done.stdout


def test_only_tests_without_a_tier_have_the_short_timeout(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    marks = "".join(f"@pytest.mark.{tier}\ndef test_{tier}(request): check(request, None)\n" for tier in TIERS)
    (tmp_path / "test_timeouts.py").write_text(
        "import pytest\n"
        "def check(request, seconds):\n"
        "    mark = request.node.get_closest_marker('timeout')\n"
        "    assert (mark and mark.args[0]) == seconds\n"
        f"{marks}"
        "def test_unit(request): check(request, 180)\n"
        "@pytest.mark.timeout(7)\n"
        "def test_own(request): check(request, 7)\n",
        encoding="utf-8",
    )
    done = run_pytest(tmp_path)
    assert set(outcomes(done).values()) == {"PASSED"}, done.stdout
    assert len(outcomes(done)) == len(TIERS) + 2


def recipe(target: str) -> str:
    """The commands of a target of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    return str(found)


def test_test_all_leaves_out_nothing_but_the_soak_tests() -> None:
    assert not re.search(r" -[mk] |tests/|deselect|ignore", recipe("test-all"))
    assert "-m 'not soak'" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "-m soak" in recipe("soak")
    assert "make test-all" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def named_tests() -> list[str]:
    """Every test that the page on reliability names, as `room/test_file.py` or `room/test_file.py::test_name`."""
    return sorted(set(re.findall(r"`((?:\w+/)?test_[\w*]+\.py(?:::\w+)?)`", RELIABILITY.read_text(encoding="utf-8"))))


def files_of(name: str) -> list[Path]:
    """The files that `room/test_file.py` or `test_*.py` means."""
    file = name.partition("::")[0]
    return sorted((ROOT / "tests").glob(file) if "/" in file else (ROOT / "tests").rglob(file))


@pytest.mark.parametrize("name", named_tests())
def test_a_test_named_as_proof_of_reliability_exists(name: str) -> None:
    files, function = files_of(name), name.partition("::")[2]
    assert files, f"docs/reliability.md names {name}, and there is no such file"
    if function:
        (file,) = files
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.heavy
def test_the_named_proofs_of_reliability_run_in_test_all() -> None:
    files = {file for name in named_tests() for file in files_of(name)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *map(str, sorted(files))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    for name in named_tests():
        function = name.partition("::")[2]
        for file in files_of(name):
            wanted = f"{file.relative_to(ROOT)}::{function}"
            assert any(found == wanted or (not function and found.startswith(wanted)) for found in collected), wanted


def test_no_test_imports_another_test_module() -> None:
    # Each test file is imported under a name of its own: its module would be there twice, with two of each class.
    for file in (ROOT / "tests").rglob("*.py"):
        for module in re.findall(r"^(?:from|import) (tests\.[\w.]+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            assert module.startswith("tests.support"), f"{file} imports {module}"


def test_the_shared_ray_is_never_another_fixtures_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="connected to another cluster"):
        SharedRay().start()


def test_a_failed_sweep_is_explained_by_its_trials() -> None:
    trial, other = SimpleNamespace(trial_id="lora-1"), SimpleNamespace(trial_id="vera-2")
    result: Any = SimpleNamespace(
        plan=SimpleNamespace(trials=[trial, other]),
        outcome=SweepOutcome(statuses={"lora-1": "FAILED"}, reasons={"lora-1": "disk full"}),
        succeeded=False,
        unconfirmed="",
        waiting_record=None,
    )
    with pytest.raises(AssertionError, match=r"lora-1: FAILED disk full\nvera-2: no status"):
        assert_succeeded(result, "what it printed")
