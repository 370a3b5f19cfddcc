"""What several tests share: a Ray cluster of two CPUs, and a command line that must refuse."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.loragrid.refusals import Refuses, Write


@pytest.fixture(scope="module")
def ray_of_two_cpus() -> Iterator[str]:
    """A Ray cluster that the tests of one file share, in which this process is the driver; gives its address."""
    import ray

    ray.init(address="local", num_cpus=2, num_gpus=0, log_to_driver=False, logging_level=logging.ERROR)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Refuses":
    """Runs a malformed experiment and checks that it is refused, by the command line, as everything must be."""
    from tests.loragrid.refusals import make_refuses

    return make_refuses(tmp_path, monkeypatch, capsys)


@pytest.fixture
def valid_experiment(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> dict[str, Any]:
    """The contents of an experiment file that could run."""
    return {
        "name": "valid",
        "model": {"name": str(tiny_llama_dir), "dtype": "float32"},
        "data": {"name": str(chat_jsonl), "max_length": 96, "num_eval": 8},
        "training": {"steps": 3, "batch_size": 4},
        "methods": ["lora"],
        "storage": {"path": str(tmp_path / "store")},
    }


@pytest.fixture
def write(valid_experiment: dict[str, Any], tmp_path: Path) -> "Write":
    """Writes that experiment with one key changed."""
    from tests.loragrid.refusals import changed

    def write_file(key: str, value: object) -> Path:
        file = tmp_path / "experiment.yaml"
        file.write_text(yaml.safe_dump(changed(valid_experiment, key, value)), encoding="utf-8")
        return file

    return write_file
