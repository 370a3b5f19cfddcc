"""Lets workers continue a queue that earlier workers left unfinished because they were killed."""

from dataclasses import dataclass, field

import torch.distributed

from loragrid.trials.packing import Pack, PackQueue
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.queue_worker import QueueWorker
from loragrid.worker.saved_trial import SavedTrial

DAMAGED_TAG = "loragrid.checkpoint.damaged"


@dataclass(frozen=True, kw_only=True)
class LeftBehind:
    """The store's contents for a queue: ids of trials that have ended, saved trials, and problems of damaged states.

    saved: without tensors for methods that write the base, see `OpenTrials.keep`.
    diverged_settings: ids of the settings of the sweep of which a trial has diverged.
    """

    ended: set[str] = field(default_factory=set)
    saved: dict[str, SavedTrial] = field(default_factory=dict)
    damaged: dict[str, list[str]] = field(default_factory=dict)
    diverged_settings: set[str] = field(default_factory=set)


def left_behind(queue: PackQueue, store: TrialStore, worker: int = 0, num_workers: int = 1) -> LeftBehind:
    """What earlier workers left in the store, the same for every worker of the queue.

    Only worker 0 reads the store and sends the others what it found, because the sweep's driver may mark another trial
    as ended in the meantime.
    """
    left = LeftBehind(ended=store.ended()) if worker == 0 else LeftBehind()
    if worker == 0:
        for trial in queue.trials:
            if trial.trial_id in left.ended:
                continue
            saved, damaged = store.load(trial.trial_id)
            if saved is not None:
                left.saved[trial.trial_id] = saved if trial.method.packable else saved.without_tensors()
            if damaged:
                left.damaged[trial.trial_id] = damaged
        # The driver marks a trial as ended before it deletes its states: trials marked since are not trained again.
        left.ended.update(store.ended())
        left.diverged_settings.update(store.diverged_settings())
        for trial_id in left.ended & left.saved.keys():
            del left.saved[trial_id]
    if num_workers > 1:
        objects = [left]
        torch.distributed.broadcast_object_list(objects, src=0)
        (left,) = objects
    return left


def recover(worker: QueueWorker, queue: PackQueue, left: LeftBehind) -> None:
    """Give a new worker what earlier ones left; it then trains the rest of the queue as if they had not stopped."""
    worker.logs.mark_ended(left.ended)
    worker.logs.diverged_settings.update(left.diverged_settings)
    for trial in queue.trials:
        if trial.trial_id in left.saved:
            worker.trials.restore(trial, left.saved[trial.trial_id])
    for pack in queue.packs:
        touched = [t for t in pack.trials if t.trial_id in left.saved or t.trial_id in left.damaged]
        if touched:
            tags = {trial_id: {DAMAGED_TAG: "; ".join(damaged)} for trial_id, damaged in left.damaged.items()}
            own_tags = {t.trial_id: tags[t.trial_id] for t in touched if t.trial_id in tags}
            worker.reporter.restored(Pack(pack_id=pack.pack_id, trials=tuple(touched)), own_tags)
