"""Decides which packs of a queue that ran out of memory are halved, left as they are, or given up."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from loragrid.trials.packing import Pack


@dataclass(frozen=True, kw_only=True)
class OpenPacks:
    """The begun packs of a failed queue, each with its open trials.

    too_large: packs to be halved. waiting: packs that were not being trained, to be continued as they are. failing: the
    ids of trials that fail, because by themselves they would fail again.
    """

    too_large: list[Pack]
    waiting: list[Pack]
    failing: set[str]

    @classmethod
    def lost(cls, packs: Sequence[Pack]) -> "OpenPacks":
        """No pack is trained again."""
        return cls(too_large=[], waiting=[], failing={trial.trial_id for pack in packs for trial in pack.trials})


def sort_open_packs(packs: Sequence[Pack], at_work: Collection[str]) -> OpenPacks:
    """Sort the packs of a queue that ran out of memory.

    `at_work` are the ids of the trials that were trained then; none if it happened between two packs. After a rung a
    pack has trials of several of the queue's packs. If no pack of the queue has more than one trial at work, all of
    them are halved, because the pack after the rung is as large as the largest of them. So repeated failures end with
    single trials, and with the one that does not fit.
    """
    working = [trial.trial_id for pack in packs for trial in pack.trials if trial.trial_id in at_work]
    several = [pack for pack in packs if len(pack.trials) > 1]
    if len(working) == 1:
        too_large, failing = [], set(working)
    elif several:
        at_fault = [pack for pack in several if sum(trial.trial_id in working for trial in pack.trials) > 1]
        too_large, failing = at_fault or several, set()
    elif working:  # these trials have not been tried alone
        too_large, failing = [], set()
    else:
        return OpenPacks.lost(packs)
    rest = [_without(pack, failing) for pack in packs]
    waiting = [pack for pack in rest if pack.trials and pack not in too_large]
    return OpenPacks(too_large=too_large, waiting=waiting, failing=failing)


def _without(pack: Pack, trial_ids: Collection[str]) -> Pack:
    """The rest gets a name of its own: Ray would continue what a queue of the same name has left."""
    rest = tuple(trial for trial in pack.trials if trial.trial_id not in trial_ids)
    return pack if len(rest) == len(pack.trials) else Pack(pack_id=f"{pack.pack_id}.0", trials=rest)
