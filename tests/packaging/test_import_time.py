"""`import loragrid`, the command line's help and the refusal of an experiment file start quickly.

CPU seconds are compared, not wall time. The limits are about four times the measured values.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from loragrid.config.method_settings import hyperparameter_types
from loragrid.config.method_source import declared_types
from loragrid_methods import get_method, method_names

ROOT = Path(__file__).resolve().parents[2]
SLOW = {"torch", "transformers", "ray", "mlflow", "pandas", "numpy", "scipy", "datasets", "matplotlib", "pyarrow"}

# Writes what the interpreter has imported, and its CPU seconds, to the file named last on the command line.
PROBE = """
import atexit, json, sys, time
def write(path=sys.argv.pop()):
    with open(path, "w") as file:
        json.dump({"modules": sorted(sys.modules), "seconds": time.process_time()}, file)
atexit.register(write)
"""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What one start of the interpreter did."""

    code: int
    err: str
    slow_modules: set[str]
    cpu_seconds: float


def start(folder: Path, code: str, *arguments: object) -> Start:
    """Runs Python code in a process of its own, with these command line arguments."""
    probe = folder / "probe.json"
    done = subprocess.run(
        [sys.executable, "-c", PROBE + code, *(str(argument) for argument in arguments), str(probe)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / root) for root in ("platform", "methods"))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    seen = json.loads(probe.read_text(encoding="utf-8"))
    return Start(
        code=done.returncode, err=done.stderr, slow_modules=SLOW & set(seen["modules"]), cpu_seconds=seen["seconds"]
    )


def loragrid(folder: Path, *arguments: object) -> Start:
    """Runs the command line."""
    return start(folder, "from loragrid.cli.main import main\nmain()", *arguments)


def test_importing_the_package_takes_no_time(tmp_path: Path) -> None:
    seen = start(tmp_path, "import loragrid")
    assert seen.code == 0, seen.err
    assert seen.slow_modules == set()
    assert seen.cpu_seconds < 0.3


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "--help"], ["plan", "-h"], ["export", "-h"]])
def test_help_is_printed_without_slow_imports(tmp_path: Path, arguments: list[str]) -> None:
    seen = loragrid(tmp_path, *arguments)
    assert seen.code == 0, seen.err
    assert seen.slow_modules == set()
    assert seen.cpu_seconds < 1.0


VALID: dict[str, Any] = {
    "name": "valid",
    "model": {"name": "smollm2-135m-instruct"},
    "data": {"name": "chitchat"},
    "training": {"steps": 3, "batch_size": 4},
    "methods": ["lora", {"name": "vera", "rank": 8}],
}

REFUSED: dict[str, tuple[dict[str, Any] | str, str]] = {
    "unknown key": (VALID | {"trainig": {}}, "did you mean 'training'"),
    "unknown key of a section": (VALID | {"training": {"steps": 3, "batch_size": 4, "rate": 1}}, "training.rate"),
    "wrong type": (VALID | {"training": {"steps": "three", "batch_size": 4}}, "training.steps"),
    "unknown method": (VALID | {"methods": ["lorra"]}, "did you mean 'lora'"),
    "unknown hyperparameter": (VALID | {"methods": [{"name": "vera", "alpha": 2}]}, "methods.0.alpha"),
    "wrong type of a hyperparameter": (VALID | {"methods": [{"name": "lora_plus", "lr_ratio": "x"}]}, "lr_ratio"),
    "axis without effect": (VALID | {"grid": {"method.rnak": [4, 8]}}, "did you mean 'method.rank'"),
    "broken YAML": ("name: [", "YAML"),
    "no mapping": ("- a\n", "is not an experiment"),
}


@pytest.mark.parametrize(("command", "case"), [*(("run", case) for case in REFUSED), ("plan", "unknown key")])
def test_a_file_is_refused_without_slow_imports(tmp_path: Path, command: str, case: str) -> None:
    contents, part = REFUSED[case]
    file = tmp_path / "experiment.yaml"
    file.write_text(contents if isinstance(contents, str) else yaml.safe_dump(contents), encoding="utf-8")
    seen = loragrid(tmp_path, command, file)
    assert seen.code == 2
    assert part in seen.err
    assert seen.slow_modules == set()
    assert seen.cpu_seconds < 1.0


def test_a_missing_file_is_refused_without_slow_imports(tmp_path: Path) -> None:
    seen = loragrid(tmp_path, "run", tmp_path / "nowhere.yaml")
    assert seen.code == 2
    assert "nowhere.yaml" in seen.err
    assert seen.slow_modules == set()
    assert seen.cpu_seconds < 1.0


def test_slow_imports_are_seen(tmp_path: Path) -> None:
    assert start(tmp_path, "import numpy").slow_modules == {"numpy"}


@pytest.mark.parametrize("method", method_names())
def test_a_methods_source_declares_what_its_class_holds(method: str) -> None:
    get_method(method)
    assert declared_types(method) is not None, "without this, refusing a file imports torch"
    assert list((declared_types(method) or {}).items()) == list(hyperparameter_types(method).items())
