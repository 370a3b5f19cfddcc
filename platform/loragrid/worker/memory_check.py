"""Checks, before a pack is trained, that every worker has enough free memory for it."""

from dataclasses import dataclass

from loragrid.data.dataset import TokenizedData
from loragrid.evaluation.task_scorer import TaskScorer
from loragrid.planning.memory_estimate import MemoryEstimate
from loragrid.training.failure import PackTooLargeError
from loragrid.training.meters import free_memory
from loragrid.training.step_mode import Mode
from loragrid.trials.packing import Pack
from loragrid.worker.pack_estimates import PackEstimates
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.solo_figures import SoloFigures

SPARE_PART = 0.1
"""Memory required beyond an estimate, as a part of it: blocks that the allocator cannot use, CUDA's workspaces."""


@dataclass(frozen=True, kw_only=True)
class MemoryCheck:
    """Predicts a pack's memory: by an estimate on a GPU, otherwise from what its trials held in packs of one."""

    group: ProcessGroup
    estimates: PackEstimates
    solo: SoloFigures

    def check(self, pack: Pack, data: TokenizedData, mode: Mode, task: TaskScorer | None) -> MemoryEstimate | None:
        """Check that the pack fits, and return its estimate, if there is one; a pack of one is tried in any case.

        Raises:
            PackTooLargeError: in all workers, if the pack does not fit in one of them.
        """
        estimate = self.estimates.of(pack.trials, data, mode, task)
        if len(pack.trials) > 1:
            if estimate is None:
                num_labels = data.train.label_positions.shape[1]
                needed = self.solo.bytes_together(pack.trials, num_labels, self.group.num_workers)
            else:
                needed = float(estimate.total - estimate.base)
            # Called even if nothing is known, because the other workers wait in the same check.
            check_that_pack_fits(self.group, needed or 0.0)
        return estimate


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
