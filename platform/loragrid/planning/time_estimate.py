"""Estimates the time of a sweep on this machine from timings of its packs' shapes."""

import heapq
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from loragrid.config.experiment import EngineConfig
from loragrid.formatting import count_of, format_seconds
from loragrid.planning.placement import Node, Placement, place
from loragrid.planning.plan import Plan
from loragrid.planning.queues import cut_for, queues_on
from loragrid.planning.timing import PackTiming, pack_shape
from loragrid.trials.packing import Pack, PackQueue


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Seconds of a sweep's packs, by pack id, and of the whole sweep on `num_places` places; None if unknown.

    queues: per queue, the ids of its packs. num_waves: the number of packs at the place that trains the most.
    sources: where the timings come from. start_seconds: time to start a queue's workers, counted in the total once per
    queue; None if no sweep has measured it yet. unknown: pack id -> why its time is not known. confirm: the same of the
    trials that confirm, whose packs start when all others have ended; None if there are none.
    """

    num_places: int
    queues: tuple[tuple[str, ...], ...]
    num_waves: int
    pack_seconds: Mapping[str, float]
    total_seconds: float | None
    sources: tuple[str, ...]
    start_seconds: float | None
    unknown: Mapping[str, str]
    confirm: "TimeEstimate | None" = None

    @property
    def sweep_seconds(self) -> float | None:
        """Seconds of the whole sweep, at most those of its trials that confirm included; None if unknown."""
        if self.confirm is None or self.total_seconds is None:
            return self.total_seconds
        return None if self.confirm.total_seconds is None else self.total_seconds + self.confirm.total_seconds

    def sentences(self) -> list[str]:
        """The estimate as lines of a plan."""
        if not self.num_places:
            return ["this machine: no place for a pack (workers: more CPUs or GPUs than it has)"]
        found = [
            f"this machine: {count_of(self.num_places, 'place')}; {count_of(self.num_packs, 'pack')}, at most "
            f"{self.num_waves} one after another"
        ]
        if self.total_seconds is not None:
            sources = ", ".join(self.sources)
            found.append(f"time on this machine: about {format_seconds(self.total_seconds)} ({sources})")
            found.append(f"not counted: {self.excluded}")
        elif self.pack_seconds:
            known = sum(self.pack_seconds.values())
            found.append(
                f"time on this machine: not known as a whole; {len(self.pack_seconds)} of "
                f"{count_of(self.num_packs, 'pack')} take about {format_seconds(known)} one after another"
            )
        else:
            found.append(f"time on this machine: not known; {HOW_TO_KNOW}")
        problems: dict[str, list[str]] = {}
        for pack_id, problem in self.unknown.items():
            problems.setdefault(problem, []).append(pack_id)
        if self.pack_seconds or problems.keys() != {NO_TIMING}:
            found += [f"{problem}: {', '.join(pack_ids)}" for problem, pack_ids in problems.items()]
        return found if self.confirm is None else [*found, self.confirm._sentence_of_confirm()]

    def _sentence_of_confirm(self) -> str:
        """The time of the trials that confirm, which comes on top of the grid's."""
        packs = f"{count_of(self.num_packs, 'pack')}, at most {self.num_waves} one after another"
        if self.total_seconds is None:
            return f"then, to confirm: {packs}; time not known ({', '.join(dict.fromkeys(self.unknown.values()))})"
        return f"then, to confirm: {packs}; at most about {format_seconds(self.total_seconds)}"

    @property
    def excluded(self) -> str:
        """Names the costs that the total does not count."""
        return EXCLUDED if self.start_seconds is not None else f"{START}, {EXCLUDED}"

    @property
    def num_packs(self) -> int:
        """The number of all packs of the plan."""
        return sum(len(queue) for queue in self.queues)

    def to_dict(self) -> dict[str, object]:
        """The estimate as JSON can hold it, with the costs that it does not count."""
        found = asdict(self) | {"excluded": self.excluded}
        found["lanes"] = found.pop("queues")  # the key that `plan --json` has always had
        return found | {"confirm": None if self.confirm is None else self.confirm.to_dict()}


ESTIMATE_TAG = "loragrid.estimate.source"
NO_TIMING = "no timing of its shape"
HOW_TO_KNOW = (
    "no pack of such a shape was timed here: --calibrate times some steps, and every sweep recorded in this storage "
    "adds timings of its shapes"
)
START = "starting Ray and the workers' processes (not measured by any sweep in this storage yet)"
EXCLUDED = (
    "tokenising, answering a task and sample prompts, saving checkpoints and adapters, and the slow-down of packs that "
    "run side by side"
)


def local_node() -> Node:
    """This machine, with the CPUs that this process may use and all its GPUs."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    num_cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Node(num_cpus=num_cpus, num_gpus=torch.cuda.device_count())


def plan_on(plan: Plan, node: Node) -> tuple[Plan, Placement]:
    """The plan as a sweep on a cluster of this one machine would cut it, and the sizes of its workers there."""
    placement = place(plan.experiment.workers, [node])
    return cut_for(plan, placement), placement


def estimate_time(
    plan: Plan, placement: Placement, timings: Mapping[str, PackTiming], start_seconds: float | None = None
) -> TimeEstimate:
    """The seconds of every pack whose shape has a timing, and of the sweep if all have one; ignores early stopping.

    timings: by pack shape. start_seconds: time to start a queue's workers; None if unknown.
    """
    engine = plan.experiment.engine
    timing_of = {
        pack.pack_id: timings.get(pack_shape(pack.trials, engine, placement.num_workers, shard=placement.shard))
        for pack in plan.packs
    }
    queues = queues_on(plan.packs, plan.experiment, placement)
    pack_seconds: dict[str, float] = {}
    unknown: dict[str, str] = {}
    for queue in queues:
        for pack, seconds in zip(queue.packs, _queue_seconds(queue.packs, engine, timing_of), strict=True):
            if seconds is None:
                timing = timing_of[pack.pack_id]
                unknown[pack.pack_id] = timing.problem if timing else NO_TIMING
            else:
                pack_seconds[pack.pack_id] = seconds
    total_seconds, num_waves = _side_by_side(queues, pack_seconds, max(1, placement.num_packs), start_seconds or 0.0)
    return TimeEstimate(
        num_places=placement.num_packs,
        queues=tuple(tuple(pack.pack_id for pack in queue.packs) for queue in queues),
        num_waves=num_waves,
        pack_seconds=pack_seconds,
        total_seconds=None if unknown or not placement.num_packs else total_seconds,
        sources=tuple(dict.fromkeys(timing.source for timing in timing_of.values() if timing and not timing.problem)),
        start_seconds=start_seconds,
        unknown=unknown,
        confirm=None if plan.confirm is None else estimate_time(plan.confirm, placement, timings, start_seconds),
    )


def _side_by_side(
    queues: Sequence[PackQueue], pack_seconds: Mapping[str, float], num_places: int, start_seconds: float
) -> tuple[float, int]:
    """Seconds until all queues have ended, and the most packs that one place trains.

    A queue starts at the place that is free first. Packs without known seconds count as zero.
    """
    num_packs_at = [0] * num_places
    places = [(0.0, index) for index in range(num_places)]
    for queue in queues:
        busy_seconds, index = heapq.heappop(places)
        num_packs_at[index] += len(queue.packs)
        seconds = sum(pack_seconds.get(pack.pack_id, 0.0) for pack in queue.packs)
        heapq.heappush(places, (busy_seconds + start_seconds + seconds, index))
    return max(places)[0], max(num_packs_at)


def _queue_seconds(
    packs: Sequence[Pack], engine: EngineConfig, timing_of: Mapping[str, PackTiming | None]
) -> list[float | None]:
    """Each pack's seconds; None if unknown.

    A pack loads the base unless the previous pack left it loaded. A queue measures each shape of trial once.
    """
    found: list[float | None] = []
    loaded: object = None
    measured: set[str] = set()
    for pack in packs:
        timing, first = timing_of[pack.pack_id], pack.trials[0]
        seconds = None if timing is None else timing.seconds(pack)
        if timing is not None and seconds is not None:
            wanted = (first.model, first.data)
            if loaded != wanted:
                seconds += timing.load
            if first.training.measure_steps:
                shapes = {pack_shape([trial], engine) for trial in pack.trials}
                seconds += timing.measure * len(shapes - measured) / len(shapes)
                measured |= shapes
            loaded = wanted if all(trial.method.packable for trial in pack.trials) else None
        found.append(seconds)
    return found
