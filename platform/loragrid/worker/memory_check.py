"""Checks, before a pack is trained, that every worker has enough free memory for it."""

from dataclasses import dataclass

from loragrid.data.dataset import TokenizedData
from loragrid.evaluation.task_scorer import TaskScorer
from loragrid.planning.memory_estimate import MemoryEstimate
from loragrid.training.step_mode import Mode
from loragrid.trials.packing import Pack
from loragrid.worker.pack_estimates import PackEstimates
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.room import check_that_pack_fits
from loragrid.worker.solo_figures import SoloFigures


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
