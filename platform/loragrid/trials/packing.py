"""Groups trials into packs that share a base, and packs into queues of nearly equal work."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loragrid.config.experiment import MEMBER_TRAINING_KEYS, EarlyStoppingConfig, PackConfig
from loragrid.trials.contests import divide
from loragrid.trials.trial import Trial
from loragrid_methods.stacks.pack import member_order

# With this many tokens at once a GPU is fully used, and more members in a pack gain nothing. Only the tokens of one
# micro batch count, because the GPU computes one micro batch at a time.
TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Trials that train together on one copy of the base, equal methods side by side.

    rung_group: packs with the same number wait for each other at the rungs of early stopping, so one queue trains them;
    None: without early stopping any queue can train the pack.
    """

    pack_id: str
    trials: tuple[Trial, ...]
    rung_group: int | None = None

    def halves(self) -> "list[Pack]":
        """The pack in two halves, or the pack itself if it has a single trial."""
        size = (len(self.trials) + 1) // 2
        parts = [self.trials[:size], self.trials[size:]]
        return [
            replace(self, pack_id=f"{self.pack_id}.{index}", trials=part) for index, part in enumerate(parts) if part
        ]


@dataclass(frozen=True, kw_only=True)
class PackQueue:
    """Packs that one group of workers trains one after another: one Tune trial, one `TorchTrainer`."""

    queue_id: str
    packs: tuple[Pack, ...]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials of all its packs."""
        return tuple(trial for pack in self.packs for trial in pack.trials)


def group_into_packs(
    trials: Sequence[Trial],
    config: PackConfig,
    num_places: int = 1,
    *,
    num_workers: int = 1,
    early_stopping: EarlyStoppingConfig | None = None,
) -> list[Pack]:
    """Trials that can share a base, cut into packs of at most `max_members` trials and of nearly equal size.

    num_places: packs that can train at the same time. With `max_members: auto`, each group of trials that can share a
    base gets its share of the places and is cut into the same number of packs per place. No place stays empty.
    early_stopping: the trials are first divided into one rung group per place, see `contests.divide`.
    Queues and files are named after packs, so the packs of trials that confirm have names of their own.
    """
    cuts: list[tuple[int | None, tuple[Trial, ...]]]
    if early_stopping is None:
        cuts = [(None, part) for part in _cut(trials, config, num_places, num_workers)]
    else:
        groups = divide(trials, early_stopping, num_places)
        cuts = [(number, part) for number, group in enumerate(groups) for part in _cut(group, config, 1, num_workers)]
    name = "confirm" if any(trial.phase == "confirm" for trial in trials) else "pack"
    return [
        Pack(pack_id=f"{name}-{index:03d}", trials=part, rung_group=number) for index, (number, part) in enumerate(cuts)
    ]


def _cut(trials: Sequence[Trial], config: PackConfig, num_places: int, num_workers: int) -> list[tuple[Trial, ...]]:
    groups: dict[object, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(sharing_key(trial), []).append(trial)
    cuts: list[tuple[Trial, ...]] = []
    for group in groups.values():
        share = round(num_places * len(group) / len(trials)) if config.max_members == "auto" else 1
        cuts += cut_evenly(group, max_members(group[0], config, num_workers), num_places=max(1, share))
    return cuts


def cut_evenly(trials: Sequence[Trial], most: int, *, num_places: int = 1) -> list[tuple[Trial, ...]]:
    """Trials that can share a base, in as few parts of at most `most` trials as possible, equal methods side by side.

    num_places: each place gets the same number of parts, if there are enough trials. Three full packs on two GPUs take
    the time of two packs; four smaller packs take the time of one and a half.
    """
    ordered = [trials[index] for index in member_order([trial.method for trial in trials])]
    num_rounds = math.ceil(len(ordered) / most / num_places)
    num_parts = min(num_rounds * num_places, len(ordered))
    cuts = [len(ordered) * (part + 1) // num_parts for part in range(num_parts)]
    return [tuple(ordered[start:end]) for start, end in itertools.pairwise([0, *cuts])]


def assign_queues(packs: Sequence[Pack], num_places: int, *, first: int = 0) -> list[PackQueue]:
    """The packs in `num_places` queues of nearly equal work; ids count from `first`.

    Packs of one rung group stay together. Within a queue, packs that share a base follow each other. Work is rows times
    steps. With enough places, every pack without a rung group has its own queue.
    """
    units = rung_units(packs)
    loads = [0] * max(1, min(num_places, len(units)))
    chosen: list[list[Pack]] = [[] for _ in loads]
    for unit in sorted(units, key=_work, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += _work(unit)
        chosen[lightest] += unit
    in_order = [sorted(queue, key=lambda pack: pack.pack_id) for queue in chosen]
    return [
        PackQueue(queue_id=queue[0].pack_id if len(queue) == 1 else f"queue-{first + index}", packs=tuple(queue))
        for index, queue in enumerate(in_order)
        if queue
    ]


def rung_units(packs: Sequence[Pack]) -> list[list[Pack]]:
    """What one queue must train as a whole: the packs of each rung group, and every other pack by itself."""
    units: dict[object, list[Pack]] = {}
    for pack in packs:
        units.setdefault(pack.pack_id if pack.rung_group is None else pack.rung_group, []).append(pack)
    return list(units.values())


def _work(packs: Sequence[Pack]) -> int:
    return sum(trial.training.batch_size * trial.training.num_steps for pack in packs for trial in pack.trials)


def sharing_key(trial: Trial) -> object:
    """A key that is equal for trials that can train in one pack: same model, data, shapes and number of steps."""
    if not trial.method.packable:
        return trial.trial_id
    shared = trial.training.model_dump(exclude=set(MEMBER_TRAINING_KEYS))
    return (trial.model, trial.data, trial.task, tuple(shared.items()))


def max_members(trial: Trial, config: PackConfig, num_workers: int = 1) -> int:
    """The most trials like this one in a pack: as configured, or as many as fill `TOKENS_AT_ONCE` on all workers."""
    if config.max_members != "auto":
        return config.max_members
    num_rows = trial.training.rows_at_once(num_workers) * num_workers
    return max(1, TOKENS_AT_ONCE // (num_rows * trial.data.max_length))
