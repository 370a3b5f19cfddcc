"""One undisturbed sweep, with which all fault tests compare their disturbed sweeps."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.shared_ray import SharedRay


@pytest.fixture(scope="session")
def faults_settings(tiny_gpt2_dir: Path, chat_jsonl: Path) -> dict[str, Any]:
    """The keys of the sweep that faults are injected into."""
    from tests.support.sweep_processes import settings_of

    return settings_of(tiny_gpt2_dir, chat_jsonl)


@pytest.fixture(scope="session")
def undisturbed(
    faults_settings: dict[str, Any], shared_ray: SharedRay, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The store of a sweep to which nothing happened."""
    import loragrid as lg
    from tests.support.sweep_processes import experiment
    from tests.support.sweep_results import assert_succeeded

    shared_ray.start()
    store = tmp_path_factory.mktemp("undisturbed")
    terminal = io.StringIO()
    assert_succeeded(
        lg.run(experiment(faults_settings, store), console=Console(file=terminal, width=200)), terminal.getvalue()
    )
    return store
