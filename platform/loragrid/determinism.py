"""Lets this process compute with kernels that repeat to the bit."""

import os

import torch

WORKSPACES = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""cuBLAS sums in an order that depends on the memory it finds, unless that is fixed; torch names these two values."""

NO_KERNEL = "does not have a deterministic implementation"
"""How torch says that there is no kernel which repeats: the operation's name stands before."""


def compute_deterministically() -> None:
    """From now on, in this process; before its first matrix product on a GPU."""
    os.environ.setdefault(*WORKSPACES)
    torch.use_deterministic_algorithms(True)
    # Only for those who read memory that they have not written, and not for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch makes it later
