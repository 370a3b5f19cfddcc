"""Tracks the queues of a sweep: which trials each trains now, and which packs the failed ones leave to be trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loragrid.sweep.open_packs import OpenPacks, sort_open_packs
from loragrid.sweep.sweep_writer import SweepWriter
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.packing import Pack, PackQueue
from loragrid.trials.tags import OUT_OF_MEMORY_TAG
from loragrid.worker.messages import PackUpdate, QueueFailure, split_tags


@dataclass(kw_only=True)
class _RunningQueue:
    """at_work: the ids of the trials that the queue trains now. gave_up: it has reported its own failure."""

    queue: PackQueue
    at_work: frozenset[str]
    gave_up: bool = False


class QueueTracker:
    """The queues that Tune trials train, by Tune's ids, and the packs that failed queues have left.

    retries: packs of a failed queue are trained again by another, so a pack that is out of memory is halved.
    """

    def __init__(self, writer: SweepWriter, *, retries: bool) -> None:
        self._writer, self._retries = writer, retries
        self._queues: dict[str, _RunningQueue] = {}
        self._failed: list[PackQueue] = []
        self._left: list[Pack] = []  # of packs that have begun

    def find(self, tune_id: str) -> PackQueue | None:
        """The queue that has begun under this id."""
        running = self._queues.get(tune_id)
        return None if running is None else running.queue

    def begin(self, tune_id: str, queue: PackQueue) -> None:
        """A queue begins with its first pack."""
        first = queue.packs[0]
        self._queues[tune_id] = _RunningQueue(queue=queue, at_work=frozenset(t.trial_id for t in first.trials))
        self._writer.start(first.trials, first.pack_id)

    def update(self, tune_id: str, update: PackUpdate) -> None:
        """A queue reports of one of its packs."""
        running, mentioned = self._queues[tune_id], frozenset(update.trial_ids)
        running.at_work = frozenset() if update.done else mentioned
        self._writer.start([t for t in running.queue.trials if t.trial_id in mentioned], update.pack_id)
        self._writer.write(update)

    def give_up(self, tune_id: str, failure: QueueFailure) -> list[Pack]:
        """A queue reports its own failure; returns the packs that are halved because of it."""
        running = self._queues[tune_id]
        running.gave_up = True
        return self._fail(running.queue, failure, running.at_work)

    def has_given_up(self, tune_id: str) -> bool:
        """Whether the queue has reported its own failure."""
        return tune_id in self._queues and self._queues[tune_id].gave_up

    def lose(self, tune_id: str, queue: PackQueue, failure: QueueFailure) -> list[Pack]:
        """Tune reports that a queue failed; returns the packs that are halved because of it.

        Tune has never announced a queue whose process could not be started. That is no pack's fault, and the next queue
        would fail in the same way: all its packs fail.
        """
        running = self._queues.get(tune_id)
        if running is None:
            self.fail_unbegun(queue.packs, failure)
        return self._fail(queue, failure, running.at_work if running is not None else frozenset())

    def fail_unbegun(self, packs: Sequence[Pack], failure: QueueFailure) -> None:
        """Record as FAILED those trials that no queue has begun: without them the sweep would look finished."""
        for pack in packs:
            unbegun = [t for t in pack.trials if not self._writer.has_started(t) and not self._writer.has_ended(t)]
            self._writer.start(unbegun, pack.pack_id)
            for trial in unbegun:
                self._writer.end(trial, _failed(failure))

    def take_left(self) -> list[Pack]:
        """The packs that failed queues have left since the last call; none of interrupted queues.

        After a lack of memory first the packs that had begun, halved or whole; then trials that had not begun.
        """
        packs = [pack for queue in self._failed for pack in queue.packs]
        unbegun = [replace(p, trials=tuple(t for t in p.trials if not self._writer.has_started(t))) for p in packs]
        left = [*self._left, *(pack for pack in unbegun if pack.trials)]
        self._failed.clear()
        self._left.clear()
        return left

    def _fail(self, queue: PackQueue, failure: QueueFailure, at_work: frozenset[str]) -> list[Pack]:
        """End the open trials of the queue's begun packs as FAILED, or leave them to be trained again.

        After a lack of memory only a trial that was trained alone fails: a pack of several is halved, because its
        halves may fit, and packs that wait at a rung are left as they are.
        """
        self._failed.append(queue)
        begun = [pack for pack in queue.packs if any(self._writer.has_started(trial) for trial in pack.trials)]
        may_fit = failure.out_of_memory and self._retries
        if may_fit:  # trials of these packs that had not begun go with the rest of their pack
            for pack in begun:
                self._writer.start(pack.trials, pack.pack_id)
        packs = [replace(pack, trials=tuple(self._writer.open_trials(pack.trials))) for pack in begun]
        found = sort_open_packs(packs, at_work) if may_fit else OpenPacks.lost(packs)
        for trial in [trial for pack in packs for trial in pack.trials if trial.trial_id in found.failing]:
            self._writer.end(trial, _failed(failure))
            if failure.out_of_memory:
                self._writer.recorder.tag_trial(trial.trial_id, {OUT_OF_MEMORY_TAG: "true"})
        for pack in found.too_large:
            self._halve(pack, failure.reason)
        self._left += found.waiting
        return found.too_large

    def _halve(self, pack: Pack, reason: str) -> None:
        for half in pack.halves():
            for trial in half.trials:
                self._writer.recorder.tag_trial(trial.trial_id, split_tags(half, pack, reason))
            self._left.append(half)


def _failed(failure: QueueFailure) -> TrialEnd:
    return TrialEnd(status="FAILED", reason=failure.reason, traceback=failure.traceback)
