"""The only module that touches private parts of torch. Every function states why no public name does the same.

Tested with torch 2.13; the sources of 2.11 have the same names. Public names are used directly elsewhere:
`torch.compiler.reset`, `torch.compiler.config.recompile_limit`.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "TorchDispatchMode",
    "allow_recomputation_of_saved_results",
    "compile_deterministically",
    "is_compiled",
    "storage_id",
    "tree_leaves",
    "uncompile",
]
# `TorchDispatchMode` sees every operator that runs, and `tree_leaves` lists the tensors among its arguments. torch
# exports neither under a public name.


def storage_id(tensor: Tensor) -> int:
    """The identity of the tensor's storage while it is alive, on every device.

    The public `data_ptr` is an address, which a new storage may reuse; on the meta device it is always 0.
    """
    return int(tensor.untyped_storage()._cdata)


def compile_deterministically() -> None:
    """Make the compiler choose kernels by rules instead of timing them, in this process.

    The public way, the environment variable `TORCHINDUCTOR_DETERMINISTIC`, is only read when torch is imported;
    `torch.compile(options=...)` would have to be repeated at every call. The import takes about a second.
    """
    from torch._inductor import config

    config.deterministic = True


def allow_recomputation_of_saved_results() -> None:
    """Let the compiler recompute elementwise results in backward, even those that a matrix product reads there.

    The partitioner's settings have no public names.
    """
    from torch._functorch import config

    config.ban_recompute_materialized_backward = False


def uncompile(module: nn.Module) -> None:
    """Undo `Module.compile`, which only sets this attribute and has no public inverse."""
    compiled: Any = module
    compiled._compiled_call_impl = None


def is_compiled(module: nn.Module) -> bool:
    """Whether `Module.compile` was called and not undone."""
    return module._compiled_call_impl is not None
