"""Makes this process compute with deterministic kernels: the same bits every time."""

import os
import re

import torch

from loragrid.training.torch_internals import compile_deterministically

WORKSPACES = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""torch requires this variable; without it, the order of cuBLAS's sums depends on the free memory."""

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
    """The failure's reason; if torch lacks a deterministic kernel, it names the operator and the experiment's key."""
    found = _NO_KERNEL.search(reason)
    if found is None:
        return reason
    return f"engine.deterministic: {found[1]} has no deterministic kernel on this device; allowed: false"
