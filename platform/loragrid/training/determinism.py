"""Makes this process compute with deterministic kernels: the same bits every time."""

import os
import re

import torch

from loragrid.training.torch_internals import compile_deterministically

WORKSPACES = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""Without this variable, which torch requires, cuBLAS sums in an order that depends on the memory that is free."""

# torch's message for an operator without a deterministic kernel.
_NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")


def compute_deterministically() -> None:
    """Use deterministic kernels from now on; call it before the process's first matrix product on a GPU."""
    os.environ.setdefault(*WORKSPACES)
    torch.use_deterministic_algorithms(True)
    compile_deterministically()
    # Filling uninitialised memory only helps code that reads it before writing, and it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch makes it later


def name_missing_kernel(reason: str) -> str:
    """A failure's reason, which names the experiment's key if torch has no deterministic kernel for an operator."""
    found = _NO_KERNEL.search(reason)
    if found is None:
        return reason
    return f"engine.deterministic: {found[1]} has no deterministic kernel on this device; allowed: false"
