"""A trial's failure as text that outlives the exception, and whether the process can continue after it."""

import traceback
from dataclasses import dataclass

import torch

from loragrid.training.determinism import name_missing_kernel
from loragrid.trials.outcome import OUT_OF_MEMORY, TrialEnd
from loragrid.trials.tags import OUT_OF_MEMORY_TAG

# The message of torch's main-memory allocator when no memory is left.
_CPU_ALLOCATOR_FAILED = "DefaultCPUAllocator: "


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An exception as text, without references to frames and tensors."""

    reason: str
    traceback: str
    out_of_memory: bool

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The exception in one line and in full."""
        lines = str(error).strip().splitlines()
        text = name_missing_kernel(lines[0] if lines else type(error).__name__)
        short_of_memory = is_out_of_memory(error)
        return cls(
            reason=f"{OUT_OF_MEMORY}: {text}" if short_of_memory else text,
            traceback="".join(traceback.format_exception(error)),
            out_of_memory=short_of_memory,
        )

    def end(self) -> TrialEnd:
        """The end of a trial with this failure."""
        return TrialEnd(status="FAILED", reason=self.reason, traceback=self.traceback)

    def tags(self) -> dict[str, str]:
        """The tag of a trial that does not fit in memory, by which tables can be filtered; {} for other failures."""
        return {OUT_OF_MEMORY_TAG: "true"} if self.out_of_memory else {}


class PackTooLargeError(torch.OutOfMemoryError):
    """A pack will not fit beside the base in one of its workers. All workers raise it together, before training."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATOR_FAILED in str(error)


def process_can_go_on(error: BaseException) -> bool:
    """Whether the process can continue. It cannot after a fault of the GPU, because every later GPU call would fail."""
    return is_out_of_memory(error) or not isinstance(error, torch.AcceleratorError)
