"""Lets workers go on where others, which were killed, have left a queue."""

from dataclasses import dataclass, field

import torch.distributed

from loragrid.trials.packing import Pack, PackQueue
from loragrid.worker.checkpoints import SavedTrial, TrialStore
from loragrid.worker.pack_trainer import PackTrainer

DAMAGED_TAG = "loragrid.checkpoint.damaged"


@dataclass(frozen=True, kw_only=True)
class LeftBehind:
    """What storage holds of a queue: the trials that have ended, saved ones, and what could not be read of them."""

    ended: set[str] = field(default_factory=set)
    saved: dict[str, SavedTrial] = field(default_factory=dict)
    damaged: dict[str, list[str]] = field(default_factory=dict)


def left_behind(queue: PackQueue, store: TrialStore, worker: int = 0, num_workers: int = 1) -> LeftBehind:
    """What earlier workers have left, the same to every worker of the queue.

    Worker 0 looks and tells the others: in the meantime the sweep's driver may mark another trial as ended.
    """
    left = LeftBehind(ended=store.ended()) if worker == 0 else LeftBehind()
    if worker == 0:
        for trial in queue.trials:
            if trial.trial_id in left.ended:
                continue
            saved, damaged = store.load(trial.trial_id)
            if saved is not None:
                left.saved[trial.trial_id] = saved
            if damaged:
                left.damaged[trial.trial_id] = damaged
        # Before the driver deletes states it marks their trial: who has ended in the meantime is not trained anew.
        left.ended.update(store.ended())
        for trial_id in left.ended & left.saved.keys():
            del left.saved[trial_id]
    if num_workers > 1:
        told = [left]
        torch.distributed.broadcast_object_list(told, src=0)
        (left,) = told
    return left


def recover(trainer: PackTrainer, queue: PackQueue, left: LeftBehind) -> None:
    """Give a fresh trainer what was left; the rest of the queue is then trained as if nothing had happened."""
    trainer.reports.ended_trials |= left.ended
    for trial_id, saved in left.saved.items():
        trainer.restore(trial_id, saved)
    for pack in queue.packs:
        touched = [t for t in pack.trials if t.trial_id in left.saved or t.trial_id in left.damaged]
        if touched:
            tags = {trial_id: {DAMAGED_TAG: "; ".join(damaged)} for trial_id, damaged in left.damaged.items()}
            own_tags = {t.trial_id: tags[t.trial_id] for t in touched if t.trial_id in tags}
            trainer.reports.restored(Pack(pack_id=pack.pack_id, trials=tuple(touched)), own_tags)
