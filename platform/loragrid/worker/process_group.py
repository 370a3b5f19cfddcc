"""A worker's device, and its number among the workers that train packs together."""

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
    """One of `num_workers` workers, counted from 0; only worker 0's reports arrive, and only it writes files.

    isolate_failures: a trial that fails is a result, and the others continue. It must be off if other workers would
    wait for this one.
    """

    device: torch.device
    worker: int = 0
    num_workers: int = 1
    isolate_failures: bool = False

    @property
    def sum_over_workers(self) -> SumOverWorkers:
        """The sum over the group, for the loop and for scoring."""
        return one_worker if self.num_workers == 1 else _all_reduce

    @property
    def memory_number(self) -> int:
        """Equal for workers that share their memory: those on CPUs of one machine."""
        return self.worker if self.device.type == "cuda" else zlib.crc32(socket.gethostname().encode())

    def where(self, worker: int) -> str:
        """The owner of a worker's memory, as a part of a sentence."""
        return f"in worker {worker}" if self.device.type == "cuda" else f"on the machine of worker {worker}"

    def of_all_workers(self, *values: float) -> list[list[float]]:
        """The values that each worker passes, by worker. All workers must call it."""
        table = torch.zeros(self.num_workers, len(values), dtype=torch.float64, device=self.device)
        table[self.worker] = torch.tensor(values, dtype=torch.float64)
        self.sum_over_workers(table)
        found: list[list[float]] = table.tolist()
        return found

    def outlives(self, error: BaseException) -> bool:
        """Whether the process can continue after this failure of some trials."""
        if isinstance(error, PackTooLargeError):  # all workers have raised it, so none waits
            return True
        return self.isolate_failures and process_can_go_on(error)


def _all_reduce(tensor: Tensor) -> None:
    torch.distributed.all_reduce(tensor)
