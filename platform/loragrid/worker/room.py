"""Checks that every worker of a group has enough free memory."""

from loragrid.training.failure import PackTooLargeError
from loragrid.training.meters import free_memory
from loragrid.worker.process_group import ProcessGroup

SPARE_PART = 0.1
"""Memory required beyond an estimate, as a part of it: blocks that the allocator cannot use, CUDA's workspaces."""


def check_that_pack_fits(group: ProcessGroup, num_bytes: float) -> None:
    """Check that every worker can hold `num_bytes` beside the base. All workers of the group must call it.

    The check is needed because too little main memory raises no exception: the process is killed. Workers on one
    machine share its main memory.

    Raises:
        PackTooLargeError: in all workers, if the pack does not fit in one of them.
    """
    own = (num_bytes * (1 + SPARE_PART), free_memory(group.device), group.memory_number)
    of_workers = group.of_all_workers(*own)
    together = [sum(other[0] for other in of_workers if other[2] == memory) for _, _, memory in of_workers]
    worst = max(range(len(of_workers)), key=lambda worker: together[worker] - of_workers[worker][1])
    needed, free = together[worst], of_workers[worst][1]
    if needed > free:
        where = "" if group.num_workers == 1 else f" {group.where(worst)}"
        raise PackTooLargeError(
            f"besides the base this pack needs about {needed / 2**30:.1f} GiB{where}, but only "
            f"{free / 2**30:.1f} are free"
        )


def have_room(group: ProcessGroup, num_bytes: float) -> bool:
    """Whether every worker can hold `num_bytes` beside what it holds now; the same answer in all workers.

    All workers of the group must call it.
    """
    try:
        check_that_pack_fits(group, num_bytes)
    except PackTooLargeError:
        return False
    return True
