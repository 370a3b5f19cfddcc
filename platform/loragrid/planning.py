"""Groups trials into packs and counts what they will train, before anything is started."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from loragrid.config import MEMBER_TRAINING_KEYS, Experiment, ModelConfig, PackConfig
from loragrid.engine_choice import EngineChoice, capture_obstacle, choose_mode, features_of_step
from loragrid.grid import Trial, expand
from loragrid.models import load_meta_model
from loragrid_methods import LayerShape, ParameterCount
from loragrid_methods.engine.pack import member_order
from loragrid_methods.engine.targets import adaptable_layers

if TYPE_CHECKING:
    from loragrid.memory_estimate import MemoryEstimate

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
class Lane:
    """Packs that one set of workers trains one after another: one Tune trial, one `TorchTrainer`."""

    lane_id: str
    packs: tuple[Pack, ...]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials of all its packs."""
        return tuple(trial for pack in self.packs for trial in pack.trials)


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """What can be counted of a base without its weights."""

    layers: tuple[LayerShape, ...]
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment's trials, their exact parameter counts by trial id, and the packs they train in."""

    experiment: Experiment
    trials: tuple[Trial, ...]
    counts: Mapping[str, ParameterCount]
    packs: tuple[Pack, ...]

    def gpu_engine(self, pack: Pack) -> EngineChoice:
        """How the pack's steps are run where its workers have GPUs; on CPUs they are always eager."""
        first, experiment = pack.trials[0], self.experiment
        workers = experiment.workers
        num_tokens = len(pack.trials) * first.training.rows_per_worker(workers.num_workers) * first.data.max_length
        return choose_mode(
            experiment.engine.mode,
            num_steps=first.training.steps,
            features_per_step=features_of_step(base_shape(first.model).layers, num_tokens),
            num_stacks=len({trial.method.stack_key() for trial in pack.trials}),
            obstacle=capture_obstacle((trial.method for trial in pack.trials), shard=workers.strategy == "shard"),
        )

    def largest_packs(self) -> list[Pack]:
        """Of all packs of trials that could share a base, the one that trains the most parameters."""
        largest: dict[object, Pack] = {}
        for pack in self.packs:
            first = pack.trials[0]
            key = sharing_key(first) if first.method.packable else (first.method.name, first.model, first.data)
            if key not in largest or self._num_trainable(pack) > self._num_trainable(largest[key]):
                largest[key] = pack
        return list(largest.values())

    def gpu_memory(self, pack: Pack) -> "MemoryEstimate | None":
        """What a worker with a GPU holds at the pack's peak; takes seconds for a base of 1B.

        Every row counts as `data.max_length` tokens long, and so does a prompt that is answered by generation. None
        where shapes alone do not tell.
        """
        # And transformers: every process imports plans.
        from loragrid.memory_estimate import ScoringShape, estimate_memory

        first, workers = pack.trials[0], self.experiment.workers
        try:
            return estimate_memory(
                load_meta_model(first.model),
                [trial.method for trial in pack.trials],
                num_rows=first.training.rows_at_once(workers.num_workers),
                length=first.data.max_length,
                mode=self.gpu_engine(pack).mode,
                activation_checkpointing=first.training.activation_checkpointing,
                num_shares=workers.num_workers if workers.strategy == "shard" else 1,
                scoring=ScoringShape.of(
                    first.task,
                    length=first.data.max_length,
                    prompt=first.data.max_length,
                    num_prompts=math.ceil(max(first.data.num_eval, first.data.num_test) / workers.num_workers),
                ),
            )
        except NotImplementedError:
            return None

    def _num_trainable(self, pack: Pack) -> int:
        return sum(self.counts[trial.trial_id].trainable for trial in pack.trials)

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON can hold it."""
        memory = {pack.pack_id: self.gpu_memory(pack) for pack in self.largest_packs()}
        pack_of = {trial.trial_id: pack.pack_id for pack in self.packs for trial in pack.trials}
        return {
            "name": self.experiment.name,
            "question": self.experiment.question,
            "trials": [
                {
                    "trial_id": trial.trial_id,
                    "pack": pack_of[trial.trial_id],
                    "parameters": trial.parameters(),
                    "trainable": self.counts[trial.trial_id].trainable,
                    "stored": self.counts[trial.trial_id].stored,
                    "shared": self.counts[trial.trial_id].shared,
                }
                for trial in self.trials
            ],
            "packs": [
                {
                    "pack_id": pack.pack_id,
                    "trials": [trial.trial_id for trial in pack.trials],
                    "gpu_engine": asdict(self.gpu_engine(pack)),
                }
                for pack in self.packs
            ],
            "gpu_memory_bytes": {
                pack_id: asdict(estimate) | {"total": estimate.total}
                for pack_id, estimate in memory.items()
                if estimate is not None
            },
        }


def plan(experiment: Experiment) -> Plan:
    """The whole plan of an experiment; starts nothing and loads no weights.

    Raises:
        ValueError: an impossible grid, an unknown model, or targets that match none of its layers.
    """
    trials = expand(experiment)
    return Plan(
        experiment=experiment,
        trials=tuple(trials),
        counts={trial.trial_id: count_parameters(trial) for trial in trials},
        packs=tuple(group_into_packs(trials, experiment.pack, num_workers=experiment.workers.num_workers)),
    )


def count_parameters(trial: Trial) -> ParameterCount:
    """The trial's exact parameter counts, from the base's shapes.

    Raises:
        ValueError: as `plan`; the message names the trial's method.
    """
    base = base_shape(trial.model)
    try:
        return trial.method.num_parameters(base.layers, base.num_parameters)
    except ValueError as error:
        raise ValueError(f"methods: {trial.method.name}: {error}") from error


@lru_cache(maxsize=8)
def base_shape(model: ModelConfig) -> BaseShape:
    """The base's adaptable layers and size, from its configuration alone."""
    base = load_meta_model(model)
    return BaseShape(
        layers=tuple(adaptable_layers(base, base.get_output_embeddings())),
        num_parameters=sum(parameter.numel() for parameter in base.parameters()),
    )


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


def assign_lanes(packs: Sequence[Pack], num_places: int, *, first: int = 0) -> list[Lane]:
    """The packs as `num_places` lanes of nearly equal work, those that share a base in a row; ids count from `first`.

    Work is counted in rows times steps. With as many places as packs, every pack has a lane of its own.
    """
    loads = [0] * max(1, min(num_places, len(packs)))
    chosen: list[list[Pack]] = [[] for _ in loads]
    for pack in sorted(packs, key=_work, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += _work(pack)
        chosen[lightest].append(pack)
    in_order = [sorted(lane, key=lambda pack: pack.pack_id) for lane in chosen]
    return [
        Lane(lane_id=lane[0].pack_id if len(lane) == 1 else f"lane-{first + index}", packs=tuple(lane))
        for index, lane in enumerate(in_order)
        if lane
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
