"""Measures time and memory: every such figure that LoraGrid reports is taken here."""

import ctypes
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from loragrid.training.torch_internals import TorchDispatchMode, storage_id, tree_leaves

KEPT_BY_RAY = 0.05
"""The part of main memory that stays unused, because Ray kills processes above 0.95 (memory_usage_threshold)."""


class Stopwatch:
    """Adds up the wall-clock seconds of named phases. The time of an inner phase does not count in the outer one.

    All phases together therefore add up to the time of the outermost one. It never waits for a GPU: queued work counts
    in the phase that waits for it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._counted_until = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time in this context as `name`."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    @property
    def is_running(self) -> bool:
        """Whether a phase is being counted."""
        return bool(self._running)

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds since the last `take`, up to now."""
        if self._running:
            self._count()
        return dict(self._seconds)

    def take(self) -> dict[str, float]:
        """As `seconds`; afterwards all phases start at zero."""
        seconds, self._seconds = self.seconds(), {}
        return seconds

    def _count(self) -> None:
        now = self._clock()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._counted_until
        self._counted_until = now


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak: the allocator's on a GPU, that of the process's resident set on a CPU (Linux)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier work left in the allocator's cache must not count
        torch.cuda.reset_peak_memory_stats(device)
        return
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # proc(5): resets VmHWM, the peak resident set size


def peak_memory(device: torch.device) -> dict[str, float]:
    """Bytes at the peak since `reset_peak_memory`, by metric key; figures that the system lacks are missing."""
    if device.type == "cuda":
        return {
            "memory/peak_allocated_bytes": float(torch.cuda.max_memory_allocated(device)),
            "memory/peak_reserved_bytes": float(torch.cuda.max_memory_reserved(device)),
        }
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return {"memory/peak_resident_bytes": float(lines["VmHWM"].split()[0]) * 1024}


def reserved_bytes(device: torch.device) -> int:
    """Bytes that torch's allocator holds on a GPU after it has returned unused memory; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def free_unused_memory(device: torch.device) -> None:
    """Release unused memory, including that of modules and hooks that refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps freed blocks of up to 32 MB below blocks in use, so an equally large pack would seem not to fit.
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that torch can still allocate; on a GPU these include cached blocks that are not in use.

    In main memory, the part `KEPT_BY_RAY` does not count as free.
    """
    if device.type != "cuda":
        memory = psutil.virtual_memory()
        return max(0, int(memory.available - KEPT_BY_RAY * memory.total))
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def weight_bytes(model: nn.Module) -> int:
    """The bytes of the model's weights (or its shares of them) in this process; each storage counts once."""
    return bytes_of(model.parameters())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of all storages behind the tensors, each counted once; of sharded tensors, this process's share."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(storages.values())


@contextmanager
def count_activation_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Count the bytes that autograd keeps for backward; on exit the yielded list has one entry, the exact sum.

    A storage kept by several operations counts once. Weights and buffers of `model` do not count.
    """
    # Storages by identity: on the meta device, where bytes can be counted too, all addresses are 0.
    resident = {storage_id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}
    result: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = storage_id(tensor)
        if storage not in resident:
            # A reference keeps the storage from being freed and its identity from being used again.
            kept.setdefault(storage, tensor.detach())
        # Not the tensor itself: an operation that saves its own output would keep itself alive.
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield result
    result.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are allocated in this context and still alive: `now`, and their `peak`.

    It works on every device. A kernel's own workspace is not counted. `block_bytes`: every storage is rounded up to a
    multiple of it, as an allocator does.
    """

    def __init__(self, *, block_bytes: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._block_bytes = block_bytes
        self._alive: dict[int, int] = {}

    def start_new_peak(self) -> None:
        """Set the peak to the bytes that are alive now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {storage_id(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and storage_id(tensor) not in given:
                self._count(tensor)
        return results

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_id(tensor)
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self._block_bytes) * self._block_bytes
        self._alive[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)
