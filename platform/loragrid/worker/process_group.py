"""Where packs are trained: a worker's device, and its place among the workers that train them together."""

import socket
import zlib
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from loragrid.training.failure import PackTooLargeError, process_can_go_on
from loragrid.training.step import SumOverWorkers, one_worker


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """One of `num_workers` workers, counted from 0; worker 0 is heard and writes.

    isolate_failures: a trial that fails is a result, and the others go on; not so where other workers would wait.
    """

    device: torch.device
    worker: int = 0
    num_workers: int = 1
    isolate_failures: bool = False

    @property
    def sum_over_workers(self) -> SumOverWorkers:
        """The sum that the loop and all that scores takes; `one_worker` where this one is alone."""
        return one_worker if self.num_workers == 1 else _all_reduce

    @property
    def memory_number(self) -> int:
        """Equal for workers that share their memory: those on the processors of one machine."""
        return self.worker if self.device.type == "cuda" else zlib.crc32(socket.gethostname().encode())

    def where(self, worker: int) -> str:
        """Whose memory that of a worker is, in words."""
        return f"in worker {worker}" if self.device.type == "cuda" else f"on the machine of worker {worker}"

    def of_all_workers(self, *values: float) -> list[list[float]]:
        """What each worker gives here, by worker. All of them must come to it."""
        table = torch.zeros(self.num_workers, len(values), dtype=torch.float64, device=self.device)
        table[self.worker] = torch.tensor(values, dtype=torch.float64)
        self.sum_over_workers(table)
        found: list[list[float]] = table.tolist()
        return found

    def outlives(self, error: BaseException) -> bool:
        """Whether the process goes on after what went wrong with some trials."""
        if isinstance(error, PackTooLargeError):  # no worker waits for another: all have raised it
            return True
        return self.isolate_failures and process_can_go_on(error)


def _all_reduce(tensor: Tensor) -> None:
    torch.distributed.all_reduce(tensor)
