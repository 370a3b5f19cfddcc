"""Only one file uses Ray's private parts, and it names the Ray versions that it was tried with."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import ray

import loragrid as lg
from loragrid.cli import main as cli
from loragrid.sweep.ray_internals import FIRST_UNTRIED_RAY, OLDEST_RAY, check_ray_version

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "loragrid"
INTERNALS = PACKAGE / "sweep" / "ray_internals.py"
PRIVATE_NAMES = {
    "ENV_VARS_TO_PROPAGATE",
    "WorkerGroupCallback",
    "ControllerCallback",
    "get_worker_group_state",
    "placement_group_handle",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "SIGUSR1",
    "RAY_AIR_NEW_OUTPUT",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
    "TUNE_DISABLE_SIGINT_HANDLER",
    "pickled_error_file",
    "ray.tune",
    "due to the node running low on memory",
}


def private_uses(source: str) -> set[str]:
    """The private modules of Ray that the source imports, and the private names in its code; comments do not count."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            modules = []
        found |= {module for module in modules if re.match(r"ray\.(.*\.)?_", module)}
        names = {getattr(node, key, None) for key in ("id", "attr", "name", "value")}
        found |= {name for name in names if isinstance(name, str) and name in PRIVATE_NAMES}
    return found


def test_only_ray_internals_uses_rays_private_parts() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file != INTERNALS]
    assert len(files) > 100
    assert {file.name: uses for file in files if (uses := private_uses(file.read_text(encoding="utf-8")))} == {}


def test_the_scan_finds_every_private_part() -> None:
    found = private_uses(INTERNALS.read_text(encoding="utf-8"))
    assert found >= PRIVATE_NAMES
    assert "ray.train.v2._internal.constants.ENV_VARS_TO_PROPAGATE" in found


def test_pyproject_and_constraints_name_the_tried_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest, first_untried = (".".join(map(str, limit)) for limit in (OLDEST_RAY, FIRST_UNTRIED_RAY))
    assert f"ray[default,train,tune]>={oldest},<{first_untried}" in project["dependencies"]
    pinned = re.search(r"^ray==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    major, minor = int(pinned[1]), int(pinned[2])
    assert (major, minor + 1) == FIRST_UNTRIED_RAY


@pytest.mark.parametrize("version", ["2.59.3", "2.61.0", "2.61.0rc1", "2.100.0", "3.0.0.dev0"])
def test_an_untried_ray_is_refused_in_one_sentence(version: str) -> None:
    with pytest.raises(ValueError, match=re.escape(version)) as refused:
        check_ray_version(version)
    assert "ray>=2.60,<2.61" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("version", ["2.60.0", "2.60.1", "2.60.0rc0"])
def test_a_tried_ray_is_accepted(version: str) -> None:
    check_ray_version(version)


def test_run_refuses_an_untried_ray_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    file = tmp_path / "refused.yaml"
    file.write_text(
        "name: refused\nmodel: {name: no-model}\ndata: {name: no-rows.jsonl}\ntraining: {steps: 1}\nmethods: [lora]\n"
        f"storage: {{path: {tmp_path / 'store'}}}\n",
        encoding="utf-8",
    )
    experiment = lg.load_experiment(file)
    for start in (lg.run, lg.trainable):
        with pytest.raises(ValueError, match=r"ray: version 2\.61\.0 is installed"):
            start(experiment)
    monkeypatch.setattr(sys, "argv", ["loragrid", "run", str(file)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ray: version 2.61.0 is installed, LoraGrid supports ray>=2.60,<2.61")
    assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()
