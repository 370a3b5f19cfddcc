"""Why a lane's workers were given up, the cause inside what Ray wraps around it; and what memory ran out for."""

import re
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from loragrid.glossary import OUT_OF_MEMORY
from loragrid.messages import LaneFailure
from loragrid.planning import Pack

# How Ray says that it ended processes because their machine was nearly full; there is no field for it.
_ENDED_FOR_MEMORY = "due to the node running low on memory"
_MEMORY_USED = re.compile(r"was ([\d.]+ ?GB)(?: used)? / ([\d.]+ ?GB)")


@dataclass(frozen=True, kw_only=True)
class OpenPacks:
    """What becomes of a failed lane's begun packs, each with its open trials.

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

    Packs on their way from a rung are made of several of the lane's: where these have a single trial at work each, all
    of the lane's are halved, for such a pack is as large as the largest of them. So what fails again and again comes
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
    """The rest has a name of its own: Ray would take up what a lane of the same name has left."""
    rest = tuple(trial for trial in pack.trials if trial.trial_id not in trial_ids)
    return pack if len(rest) == len(pack.trials) else Pack(pack_id=f"{pack.pack_id}.0", trials=rest)


def describe_failure(error: BaseException | None) -> LaneFailure:
    """What Ray's workers, or the trial that started them, raised."""
    causes = list(_causes(error))
    text = "" if error is None else "".join(traceback.format_exception(error))
    out_of_memory = next((str(cause) for cause in causes if _ENDED_FOR_MEMORY in str(cause)), None)
    if out_of_memory is not None:
        return LaneFailure(reason=_out_of_memory_reason(out_of_memory), traceback=text, out_of_memory=True)
    return LaneFailure(reason=_innermost(causes), traceback=text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what lies below it, the innermost cause last."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        failures = getattr(error, "worker_failures", None)
        nested = next(iter(failures.values()), None) if failures else None
        error = nested or getattr(error, "cause", None) or error.__cause__


def _innermost(causes: list[BaseException]) -> str:
    """In one line, without Ray's wrapping."""
    for cause in reversed(causes):
        text = str(cause).strip()
        if text:
            # Ray's own wrappers carry the remote traceback as text, whose last line is the exception itself.
            return text.splitlines()[-1]
    return "unknown"


def _out_of_memory_reason(text: str) -> str:
    used = _MEMORY_USED.search(text)
    full = f"had {used[1]} of {used[2]} in use" if used else "was nearly full"
    return f"{OUT_OF_MEMORY}: Ray ended the workers, whose machine {full}"
