"""Decides which packs of a queue that ran out of memory are halved, kept as they are, or given up."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from loragrid.trials.packing import Pack


@dataclass(frozen=True, kw_only=True)
class OpenPacks:
    """The begun packs of a failed queue, each with its open trials.

    too_large: packs to be halved. waiting: packs to be continued as they are. failing: ids of trials that end as
    FAILED, because training them again would fail too.
    """

    too_large: list[Pack]
    waiting: list[Pack]
    failing: set[str]

    @classmethod
    def lost(cls, packs: Sequence[Pack], at_work: Collection[str] = ()) -> "OpenPacks":
        """The trials at work fail and are not trained again; packs that wait at a rung continue.

        at_work: ids of the trials that were being trained; without one all trials fail, so failures come to an end.
        """
        open_ids = {trial.trial_id for pack in packs for trial in pack.trials}
        failing = open_ids & set(at_work) or open_ids
        rest = [_without(pack, failing) for pack in packs]
        return cls(too_large=[], waiting=[pack for pack in rest if pack.trials], failing=failing)


def sort_open_packs(packs: Sequence[Pack], at_work: Collection[str]) -> OpenPacks:
    """Sort the packs of a queue that ran out of memory.

    at_work: ids of the trials that were being trained; empty if memory ran out between two packs.

    * One trial at work: it fails, because it does not fit by itself.
    * Several trials at work: the packs with at least two of them are halved. If there is no such pack, every pack of
      several trials is halved: after a rung, trials of several packs train as one pack, which is as large as the
      largest of them. If all packs are single trials, they continue as they are.
    * No trial at work: the packs of several trials are halved; if all packs are single trials, all fail.

    Repeated failures therefore end with single trials, of which only those that do not fit fail.
    """
    working = [trial.trial_id for pack in packs for trial in pack.trials if trial.trial_id in at_work]
    several = [pack for pack in packs if len(pack.trials) > 1]
    if len(working) == 1:
        too_large, failing = [], set(working)
    elif several:
        at_fault = [pack for pack in several if sum(trial.trial_id in working for trial in pack.trials) > 1]
        too_large, failing = at_fault or several, set()
    elif working:  # none of these trials has been trained by itself yet
        too_large, failing = [], set()
    else:
        return OpenPacks.lost(packs)
    rest = [_without(pack, failing) for pack in packs]
    waiting = [pack for pack in rest if pack.trials and pack not in too_large]
    return OpenPacks(too_large=too_large, waiting=waiting, failing=failing)


def _without(pack: Pack, trial_ids: Collection[str]) -> Pack:
    """The pack without these trials, under a new name, because Ray would continue a queue of the same name."""
    rest = tuple(trial for trial in pack.trials if trial.trial_id not in trial_ids)
    return pack if len(rest) == len(pack.trials) else replace(pack, pack_id=f"{pack.pack_id}.0", trials=rest)
