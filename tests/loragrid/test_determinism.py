"""`engine.deterministic`: kernels that repeat to the bit alone, and a clear word where there is none."""

import os
from collections.abc import Iterator

import pytest
import torch

from loragrid.determinism import WORKSPACES, compute_deterministically
from loragrid.failure import Failure


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(WORKSPACES[0], raising=False)
    compute_deterministically()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # as in the module


@pytest.mark.usefixtures("deterministic")
def test_torch_is_told_cublas_has_fixed_workspaces_and_empty_tensors_are_not_filled() -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8"), "what torch asks for"
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def test_workspaces_that_the_user_has_chosen_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACES[0], ":16:8")
    try:
        compute_deterministically()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.mark.usefixtures("deterministic")
def test_a_trial_whose_model_has_no_such_kernel_says_which_and_what_to_do() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert Failure.of(raised.value).reason == (
        "engine.deterministic: no kernel of put_ here repeats to the bit; allowed: false"
    )
