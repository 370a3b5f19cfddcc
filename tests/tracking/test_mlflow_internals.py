"""Only one module uses parts of MLflow that MLflow does not document."""

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import loragrid
from loragrid.tracking.mlflow_internals import quiet_store, silent_store_errors

PACKAGE = Path(loragrid.__file__).parent
PUBLIC_MODULES = {"mlflow", "mlflow.entities", "mlflow.exceptions"}
LOGGERS = ("mlflow.store.db.utils", "alembic")


def mlflow_names(path: Path) -> Iterator[str]:
    """The modules of MLflow that a file imports, and its texts that name one of MLflow's loggers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.partition(".")[0] == "mlflow")
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] == "mlflow":
                yield module
            case ast.Constant(value=str(text)) if text in LOGGERS:
                yield text


def test_only_one_module_names_undocumented_parts_of_mlflow() -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if set(mlflow_names(path)) - PUBLIC_MODULES
    }
    assert users == {"tracking/mlflow_internals.py"}


def test_the_check_finds_private_imports_and_logger_names(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import mlflow.store\nfrom mlflow.protos import x\nname = 'alembic'\nfrom mlflow import y\n")
    assert sorted(mlflow_names(file)) == ["alembic", "mlflow", "mlflow.protos", "mlflow.store"]


@pytest.mark.parametrize(
    ("context", "level"), [(quiet_store, logging.WARNING), (silent_store_errors, logging.CRITICAL)]
)
def test_a_quiet_logger_gets_its_level_back(context: object, level: int) -> None:
    logger = logging.getLogger("mlflow.store.db.utils")
    before = logger.level
    with context():  # type: ignore[operator]
        assert logger.level >= level
    assert logger.level == before
