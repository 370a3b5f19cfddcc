"""Groups trials into packs that share a base, and packs into queues of nearly equal work."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from loragrid.config.experiment import MEMBER_TRAINING_KEYS, PackConfig
from loragrid.trials.trial import Trial
from loragrid_methods.stacks.pack import member_order

# Beyond this many tokens at once a GPU is full, and more members in a pack gain nothing. Of a step in micro batches
# those of one count: a GPU that one of them leaves half empty is so for the whole step, whatever the batch's size.
TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Trials that train together on one copy of the base, equal methods side by side."""

    pack_id: str
    trials: tuple[Trial, ...]

    def halves(self) -> "list[Pack]":
        """The pack as two, or as one where it has a single trial."""
        size = (len(self.trials) + 1) // 2
        parts = [self.trials[:size], self.trials[size:]]
        return [Pack(pack_id=f"{self.pack_id}.{index}", trials=part) for index, part in enumerate(parts) if part]


@dataclass(frozen=True, kw_only=True)
class PackQueue:
    """Packs that one set of workers trains one after another: one Tune trial, one `TorchTrainer`."""

    queue_id: str
    packs: tuple[Pack, ...]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials of all its packs."""
        return tuple(trial for pack in self.packs for trial in pack.trials)


def group_into_packs(
    trials: Sequence[Trial], config: PackConfig, num_places: int = 1, *, num_workers: int = 1
) -> list[Pack]:
    """Trials that can share a base, cut into packs of at most `max_members` and of nearly equal size.

    With `num_places` for packs side by side, and `max_members` left open, no place stays empty while another has a
    large pack: every group of trials is cut into as many packs for each place of its share.
    """
    groups: dict[object, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(sharing_key(trial), []).append(trial)
    cuts: list[tuple[Trial, ...]] = []
    for group in groups.values():
        share = round(num_places * len(group) / len(trials)) if config.max_members == "auto" else 1
        cuts += cut_evenly(group, max_members(group[0], config, num_workers), num_places=max(1, share))
    return [Pack(pack_id=f"pack-{index:03d}", trials=part) for index, part in enumerate(cuts)]


def cut_evenly(trials: Sequence[Trial], most: int, *, num_places: int = 1) -> list[tuple[Trial, ...]]:
    """Trials that can share a base in as few parts of at most `most` as possible, equal methods side by side.

    `num_places`: each gets as many parts, if there are trials enough. Three full packs on two GPUs would take the time
    of two; four smaller ones, the time of one and a half.
    """
    ordered = [trials[index] for index in member_order([trial.method for trial in trials])]
    num_rounds = math.ceil(len(ordered) / most / num_places)
    num_parts = min(num_rounds * num_places, len(ordered))
    cuts = [len(ordered) * (part + 1) // num_parts for part in range(num_parts)]
    return [tuple(ordered[start:end]) for start, end in itertools.pairwise([0, *cuts])]


def assign_queues(packs: Sequence[Pack], num_places: int, *, first: int = 0) -> list[PackQueue]:
    """The packs as `num_places` queues of nearly equal work, those that share a base in a row; ids count from `first`.

    Work is counted in rows times steps. With as many places as packs, every pack has a queue of its own.
    """
    loads = [0] * max(1, min(num_places, len(packs)))
    chosen: list[list[Pack]] = [[] for _ in loads]
    for pack in sorted(packs, key=_work, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += _work(pack)
        chosen[lightest].append(pack)
    in_order = [sorted(queue, key=lambda pack: pack.pack_id) for queue in chosen]
    return [
        PackQueue(queue_id=queue[0].pack_id if len(queue) == 1 else f"queue-{first + index}", packs=tuple(queue))
        for index, queue in enumerate(in_order)
        if queue
    ]


def _work(pack: Pack) -> int:
    training = pack.trials[0].training
    return len(pack.trials) * training.batch_size * training.steps


def sharing_key(trial: Trial) -> object:
    """Trials with equal keys can train in one pack: same model, data, shapes and number of steps."""
    if not trial.method.packable:
        return trial.trial_id
    shared = trial.training.model_dump(exclude=set(MEMBER_TRAINING_KEYS))
    return (trial.model, trial.data, trial.task, tuple(shared.items()))


def max_members(trial: Trial, config: PackConfig, num_workers: int = 1) -> int:
    """How many trials like this one a pack holds: as configured, or as many as fill `TOKENS_AT_ONCE` on all workers."""
    if config.max_members != "auto":
        return config.max_members
    num_rows = trial.training.rows_at_once(num_workers) * num_workers
    return max(1, TOKENS_AT_ONCE // (num_rows * trial.data.max_length))
