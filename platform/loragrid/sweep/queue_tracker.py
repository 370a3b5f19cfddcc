"""Tracks a sweep's queues: the trials that each is training, and the packs that failed queues leave to be trained."""

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
    """A queue that has begun. at_work: ids of the trials it is training. gave_up: it has reported its own failure."""

    queue: PackQueue
    at_work: frozenset[str]
    gave_up: bool = False


class QueueTracker:
    """The queues that have begun, by the ids of their Tune trials, and the packs that failed queues have left.

    retries: another queue trains the packs that a failed queue leaves; a pack that ran out of memory is then halved.
    """

    def __init__(self, writer: SweepWriter, *, retries: bool) -> None:
        self._writer, self._retries = writer, retries
        self._queues: dict[str, _RunningQueue] = {}
        self._failed: list[PackQueue] = []
        self._left: list[Pack] = []  # packs that had begun, halved or whole

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
        """A queue reports an update of one of its packs."""
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

        Tune never announces a queue whose process could not be started. All packs of such a queue fail: none of them
        is the cause, and another queue would fail in the same way.
        """
        running = self._queues.get(tune_id)
        if running is None:
            self.fail_unbegun(queue.packs, failure)
        return self._fail(queue, failure, running.at_work if running is not None else frozenset())

    def fail_unbegun(self, packs: Sequence[Pack], failure: QueueFailure) -> None:
        """Record trials that no queue has begun as FAILED; otherwise the sweep would look finished."""
        for pack in packs:
            unbegun = [t for t in pack.trials if not self._writer.has_started(t) and not self._writer.has_ended(t)]
            self._writer.start(unbegun, pack.pack_id)
            for trial in unbegun:
                self._writer.end(trial, _failed(failure))

    def take_left(self) -> list[Pack]:
        """The packs left by queues that failed since the last call; interrupted queues leave none.

        Packs that had begun when memory ran out come first, halved or whole. Trials that had not begun follow.
        """
        packs = [pack for queue in self._failed for pack in queue.packs]
        unbegun = [replace(p, trials=tuple(t for t in p.trials if not self._writer.has_started(t))) for p in packs]
        left = [*self._left, *(pack for pack in unbegun if pack.trials)]
        self._failed.clear()
        self._left.clear()
        return left

    def _fail(self, queue: PackQueue, failure: QueueFailure, at_work: frozenset[str]) -> list[Pack]:
        """End the open trials of the queue's begun packs as FAILED, or leave them to be trained again.

        If memory ran out, only a trial that was trained by itself fails. A pack of several trials is halved, because
        its halves may fit. After another failure the trials at work fail. Packs that wait at a rung are kept as they
        are.
        """
        self._failed.append(queue)
        begun = [pack for pack in queue.packs if any(self._writer.has_started(trial) for trial in pack.trials)]
        may_fit = failure.out_of_memory and self._retries
        if may_fit:  # trials that had not begun are treated like the rest of their pack
            for pack in begun:
                self._writer.start(pack.trials, pack.pack_id)
        packs = [replace(pack, trials=tuple(self._writer.open_trials(pack.trials))) for pack in begun]
        to_blame = at_work if self._retries else ()
        found = sort_open_packs(packs, at_work) if may_fit else OpenPacks.lost(packs, to_blame)
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
