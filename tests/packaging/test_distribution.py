"""The wheel and the sdist have the right contents, and the wheel works in an environment without the checkout.

Only the wheel is installed there. It uses the dependencies of the environment that runs the tests, because installing
them again would take minutes and gigabytes.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from loragrid_methods import method_names

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]
PACKAGES = {"loragrid": ROOT / "platform" / "loragrid", "loragrid_methods": ROOT / "methods" / "loragrid_methods"}
NOT_DISTRIBUTED = {".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "loragrid-store", ".git"}

pytestmark = pytest.mark.end_to_end


def environment() -> dict[str, str]:
    """The variables of a user who has no checkout."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MLFLOW_TRACKING_URI"}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "RAY_ADDRESS": "", "OMP_NUM_THREADS": "1"}


def call(*command: object, cwd: Path) -> str:
    """What a command prints; it must succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, out: Path, *options: str) -> None:
    """Builds with the build backend that is installed: nothing is fetched."""
    call(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out, source, cwd=out)


def contents(wheel: Path) -> dict[str, bytes]:
    """Name -> content of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout, and the wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"loragrid-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    return built / f"loragrid-{VERSION}.tar.gz"


def test_the_wheel_holds_every_file_of_both_packages(wheel: Path) -> None:
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected
    assert {"loragrid/report/templates/report.html.j2", "loragrid/report/templates/report.css"} <= held
    assert {"loragrid/py.typed", "loragrid_methods/py.typed"} <= held


def test_the_metadata_of_the_wheel_is_complete(wheel: Path) -> None:
    files = contents(wheel)
    info = f"loragrid-{VERSION}.dist-info"
    metadata = Parser().parsestr(files[f"{info}/METADATA"].decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] == "LoraGrid contributors"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert "Programming Language :: Python :: 3.12" in metadata.get_all("Classifier", [])
    assert len(metadata.get_all("Project-URL", [])) >= 5
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"loragrid = loragrid.cli.main:main" in files[f"{info}/entry_points.txt"]


def test_the_checkout_builds_the_same_wheel_as_the_sdist(wheel: Path, tmp_path: Path) -> None:
    build(ROOT, tmp_path, "--wheel")
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_the_sdist_holds_the_project_without_caches(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [Path(name).relative_to(f"loragrid-{VERSION}") for name in archive.getnames()]
    assert not [name for name in names if NOT_DISTRIBUTED & set(name.parts)]
    held = {name.as_posix() for name in names}
    assert {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "Makefile", "constraints.txt"} <= held
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments").iterdir()} <= held
    assert Path(__file__).relative_to(ROOT).as_posix() in held
    assert sdist.stat().st_size < 5_000_000


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A virtual environment with the wheel, and a working folder outside the checkout."""

    environment: Path
    folder: Path

    def run(self, program: str, *arguments: object) -> str:
        """What a program of the environment prints."""
        return call(self.environment / "bin" / program, *arguments, cwd=self.folder)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    place = tmp_path_factory.mktemp("installation")
    installation = Installation(environment=place / "venv", folder=place / "work")
    installation.folder.mkdir()
    call(sys.executable, "-m", "venv", "--without-pip", installation.environment, cwd=place)
    python = installation.environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    call(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=place)
    # Folders named in a .pth file come last, and .pth files in them, such as that of an editable install, are not read.
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (own,) = (installation.environment / "lib").glob("python3.*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    return installation


@pytest.fixture
def experiment(installed: Installation, tiny_llama_dir: Path, chat_jsonl: Path) -> Path:
    file = installed.folder / "tiny.yaml"
    keys = {
        "name": "tiny",
        "model": {"name": str(tiny_llama_dir), "dtype": "float32"},
        "data": {"name": str(chat_jsonl), "max_length": 96, "num_eval": 8},
        "training": {"steps": 2, "batch_size": 4, "lr": 1e-2, "measure_steps": 0},
        "methods": ["lora", {"name": "vera", "rank": 8}],
        "workers": {"cpus_per_worker": 1},
    }
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return file


def test_the_installed_packages_are_the_wheels(installed: Installation) -> None:
    code = (
        "import sys, loragrid, loragrid_methods\n"
        "from importlib.metadata import distribution\n"
        "print(loragrid.__file__, loragrid_methods.__file__, distribution('loragrid').locate_file(''), sep='\\n')\n"
        f"assert not [path for path in sys.path if path.startswith({str(ROOT / 'platform')!r})]"
    )
    places = installed.run("python", "-c", code).split()
    assert len(places) == 3
    for place in places:
        assert Path(place).is_relative_to(installed.environment)


def test_the_installed_command_prints_every_method(installed: Installation) -> None:
    text = installed.run("loragrid", "methods")
    for name in method_names():
        assert f"name in an experiment file: {name}" in text


def test_the_installed_command_plans(installed: Installation, experiment: Path) -> None:
    assert "2 trials in 1 pack" in installed.run("loragrid", "plan", experiment)


def test_the_installed_command_runs_a_sweep(installed: Installation, experiment: Path) -> None:
    printed = installed.run("loragrid", "run", experiment)
    assert "eval loss before training" in printed
    store = installed.folder / "loragrid-store"
    assert (store / "mlflow.db").exists()
    assert "<html" in (store / "tiny-1.html").read_text(encoding="utf-8")
    check_every_process_used_the_wheel(installed.run)


def check_every_process_used_the_wheel(run: Callable[..., str]) -> None:
    """A worker records the commit of the code it ran: outside a checkout there is none."""
    code = (
        "import mlflow\n"
        "client = mlflow.MlflowClient('sqlite:///loragrid-store/mlflow.db')\n"
        "(experiment,) = client.search_experiments(filter_string=\"name = 'tiny'\")\n"
        "tags = [run.data.tags for run in client.search_runs([experiment.experiment_id])]\n"
        "print(len(tags), [key for tag in tags for key in tag if 'commit' in key])"
    )
    assert run("python", "-c", code).split(maxsplit=1) == ["3", "[]\n"]
