"""`engine.deterministic` uses only kernels that repeat to the bit, and an operation without one fails with its name."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as compiler

from loragrid.cli import main as cli
from loragrid.config.experiment import EngineConfig
from loragrid.sweep.queue_failure import describe_failure
from loragrid.training.determinism import WORKSPACES, compute_deterministically
from loragrid.training.failure import Failure
from loragrid.worker.resident_base import ResidentBase, _composition
from loragrid_methods.stacks.targets import adaptable_layers
from tests.support.small_packs import make_setup


@pytest.fixture
def switched_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test torch is as it was before."""
    monkeypatch.delenv(WORKSPACES[0], raising=False)
    if hasattr(compiler, "deterministic"):
        monkeypatch.setattr(compiler, "deterministic", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def switched_on(switched_back: None) -> None:
    compute_deterministically()


@pytest.mark.usefixtures("switched_on")
def test_deterministic_mode_sets_workspaces_and_leaves_empty_tensors_unfilled() -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8"), "what torch asks for"
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert getattr(compiler, "deterministic", True), "nor does the compiler choose by timing, where it can be told"


@pytest.mark.usefixtures("switched_back")
def test_workspaces_that_the_user_has_chosen_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACES[0], ":16:8")
    compute_deterministically()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("deterministic", [False, True])
def test_with_deterministic_kernels_a_continued_pack_keeps_its_mode(
    tiny_llama_dir: Path, chat_jsonl: Path, deterministic: bool
) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    trials = [setup.trial("lora", steps=200_000_000)]
    warm = ResidentBase(
        torch.device("cuda"), EngineConfig(deterministic=deterministic), 1
    )  # no GPU is asked for a choice
    warm._base = setup.base()
    warm._layers = adaptable_layers(warm._base, warm._base.get_output_embeddings())
    choices = [warm.choose_mode(trials, 32, num_steps).mode for num_steps in (200_000_000, 10)]
    assert choices == ["compiled", "compiled" if deterministic else "graph"]
    warm._compiled_for = _composition(few := [setup.trial("lora", steps=10)])
    assert warm.choose_mode(few, 32, 10).mode == ("graph" if deterministic else "compiled")


@pytest.mark.usefixtures("switched_on")
def test_a_missing_deterministic_kernel_is_named_with_a_remedy() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    expected = "engine.deterministic: put_ has no deterministic kernel on this device; allowed: false"
    assert Failure.of(raised.value).reason == expected
    assert describe_failure(RuntimeError(f"ray::worker\nRuntimeError: {raised.value}")).reason == expected
    assert describe_failure(RuntimeError("something else")).reason == "something else"


@pytest.mark.usefixtures("switched_back")
def test_a_calibration_names_a_missing_deterministic_kernel(
    write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*arguments: object) -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    monkeypatch.setattr("loragrid.sweep.calibration.train_step", step)
    file = write("engine.deterministic", True)
    monkeypatch.setattr(sys, "argv", ["loragrid", "plan", str(file), "--calibrate"])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        torch.set_num_threads(threads)
    assert ended.value.code == 2
    expected = "engine.deterministic: put_ has no deterministic kernel on this device; allowed: false"
    assert expected in capsys.readouterr().err
