"""What becomes of the packs of a queue that memory ran out for: halved, left as they are, or given up."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from loragrid.trials.packing import Pack


@dataclass(frozen=True, kw_only=True)
class OpenPacks:
    """What becomes of a failed queue's begun packs, each with its open trials.

    too_large: they are to be halved. waiting: others were trained, they go on as they are. alone: the ids of trials
    that fail, for by themselves they would again.
    """

    too_large: list[Pack]
    waiting: list[Pack]
    alone: set[str]

    @classmethod
    def lost(cls, packs: Sequence[Pack]) -> "OpenPacks":
        """None goes on."""
        return cls(too_large=[], waiting=[], alone={trial.trial_id for pack in packs for trial in pack.trials})


def sort_open_packs(packs: Sequence[Pack], at_work: Collection[str]) -> OpenPacks:
    """Where memory ran out. At work are the trials that were trained then: none, where it was between two packs.

    Packs on their way from a rung are made of several of the queue's: where these have a single trial at work each, all
    of the queue's are halved, for such a pack is as large as the largest of them. So what fails again and again comes
    down to single trials in the end, and to the one that does not fit.
    """
    working = [trial.trial_id for pack in packs for trial in pack.trials if trial.trial_id in at_work]
    several = [pack for pack in packs if len(pack.trials) > 1]
    if len(working) == 1:
        too_large, alone = [], set(working)
    elif several:
        at_fault = [pack for pack in several if sum(trial.trial_id in working for trial in pack.trials) > 1]
        too_large, alone = at_fault or several, set()
    elif working:  # alone they have not been tried
        too_large, alone = [], set()
    else:
        return OpenPacks.lost(packs)
    rest = [_without(pack, alone) for pack in packs]
    waiting = [pack for pack in rest if pack.trials and pack not in too_large]
    return OpenPacks(too_large=too_large, waiting=waiting, alone=alone)


def _without(pack: Pack, trial_ids: Collection[str]) -> Pack:
    """The rest has a name of its own: Ray would take up what a queue of the same name has left."""
    rest = tuple(trial for trial in pack.trials if trial.trial_id not in trial_ids)
    return pack if len(rest) == len(pack.trials) else Pack(pack_id=f"{pack.pack_id}.0", trials=rest)
