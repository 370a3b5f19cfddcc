"""The parts of MLflow that LoraGrid relies on although MLflow does not document them.

Only this module names them, so that an upgrade of MLflow is checked in one place. They were tried with MLflow 3.13.0
and 3.17.2. The addresses of MLflow's web pages, which it does not document either, are in `pages`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_STORE_LOGGER = "mlflow.store.db.utils"
"""Logs the creation of an SQL store, and every SQL error once more before MLflow raises it."""

LOGGED_ARTIFACTS_TAG = "mlflow.loggedArtifacts"
"""Lists the tables of a run as JSON; `MlflowClient.log_table` sets it, MLflow's pages and `load_table` read it."""

_MIGRATION_LOGGER = "alembic"
"""Logs every migration of the tables while MLflow creates an SQL store."""


@contextmanager
def quiet_store() -> Iterator[None]:
    """Hide the two dozen lines that MLflow logs when it creates an SQLite store; warnings are still shown."""
    with _at_least(logging.WARNING, (_STORE_LOGGER, _MIGRATION_LOGGER)):
        yield


@contextmanager
def silent_store_errors() -> Iterator[None]:
    """Hide the errors that MLflow's SQL store logs, because it raises them too."""
    with _at_least(logging.CRITICAL, (_STORE_LOGGER,)):
        yield


@contextmanager
def _at_least(level: int, names: Sequence[str]) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(level, logger.level))
    try:
        yield
    finally:
        for logger, previous in zip(loggers, levels, strict=True):
            logger.setLevel(previous)
