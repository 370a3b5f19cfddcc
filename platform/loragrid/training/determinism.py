"""Lets this process compute with kernels that repeat to the bit."""

import os
import re

import torch

from loragrid.training.torch_internals import compile_deterministically

WORKSPACES = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""cuBLAS sums in an order that depends on the memory it finds, unless this variable fixes it; torch asks for it."""

# How torch says that there is no kernel which repeats.
_NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")


def compute_deterministically() -> None:
    """From now on, in this process; before its first matrix product on a GPU."""
    os.environ.setdefault(*WORKSPACES)
    torch.use_deterministic_algorithms(True)
    compile_deterministically()
    # Filling uninitialised memory only helps code that reads it before writing, and it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch makes it later


def name_missing_kernel(reason: str) -> str:
    """A reason why something failed, in our words where it is that torch has no kernel which repeats."""
    found = _NO_KERNEL.search(reason)
    if found is None:
        return reason
    return f"engine.deterministic: no kernel of {found[1]} here repeats to the bit; allowed: false"
