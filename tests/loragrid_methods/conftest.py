"""Bases on which a method is compared with PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.pack_training import TinyModel


@pytest.fixture(params=["nn.Linear", "Conv1D"])
def base_of(request: pytest.FixtureRequest, tiny_gpt2_dir: Path) -> Callable[[], Any]:
    """A function that makes the base anew, in float64: our tiny model or GPT-2, whose weights are stored (in, out)."""

    def load_gpt2() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir, dtype=torch.float64)
        return model.eval()

    return TinyModel if request.param == "nn.Linear" else load_gpt2
