"""Groups trials into packs and counts their parameters before anything is started."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from loragrid.config.experiment import Experiment, ModelConfig
from loragrid.models.loading import load_meta_model
from loragrid.training.step_mode import ModeChoice, capture_obstacle, choose_mode, features_of_step
from loragrid.trials.confirm import confirm_trials, fresh_seeds
from loragrid.trials.expand import expand
from loragrid.trials.lengths import complete
from loragrid.trials.trial import Trial
from loragrid_methods import ParameterCount
from loragrid_methods.stacks.base_layers import BaseLayers, adaptable_layers

if TYPE_CHECKING:
    from loragrid.config.experiment import DataConfig
    from loragrid.planning.memory_estimate import MemoryEstimate
    from loragrid.planning.rows import PlannedRows
from loragrid.trials.packing import Pack, group_into_packs, sharing_key


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """The shape of a base, known from its configuration without its weights."""

    layers: BaseLayers
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment's trials, their exact parameter counts (by trial id) and the packs they train in.

    rows: what is known of the rows of each model and data set; empty if the plan was made without reading them.
    """

    experiment: Experiment
    trials: tuple[Trial, ...]
    counts: Mapping[str, ParameterCount]
    packs: tuple[Pack, ...]
    confirm: "Plan | None" = None
    """The trials that would confirm each method's most expensive setting, an upper bound of what will be confirmed;
    None if the experiment confirms nothing."""
    rows: "Mapping[tuple[ModelConfig, DataConfig], PlannedRows]" = field(default_factory=dict)

    def row_length(self, trial: Trial) -> int:
        """The positions that are computed for a row of the trial; without its rows, the most that it can have."""
        rows = self.rows.get((trial.model, trial.data))
        return trial.data.max_length if rows is None else rows.length

    @property
    def phases(self) -> "tuple[Plan, ...]":
        """The plan itself and, if there is one, that of the trials that confirm."""
        return (self,) if self.confirm is None else (self, self.confirm)

    def gpu_engine(self, pack: Pack) -> ModeChoice:
        """How the pack's steps are run if its workers have GPUs; on CPUs they are always eager."""
        first, experiment = pack.trials[0], self.experiment
        workers = experiment.workers
        num_tokens = len(pack.trials) * first.training.rows_per_worker(workers.num_workers) * self.row_length(first)
        return choose_mode(
            experiment.engine.mode,
            num_steps=first.training.num_steps,
            features_per_step=features_of_step(base_shape(first.model).layers, num_tokens),
            num_stacks=len({trial.method.stack_key() for trial in pack.trials}),
            obstacle=capture_obstacle((trial.method for trial in pack.trials), shard=workers.strategy == "shard"),
        )

    def largest_packs(self) -> list[Pack]:
        """For every set of packs whose trials can share a base, the pack that trains the most parameters."""
        largest: dict[object, Pack] = {}
        for pack in self.packs:
            first = pack.trials[0]
            key = sharing_key(first) if first.method.packable else (first.method.name, first.model, first.data)
            if key not in largest or self._num_trainable(pack) > self._num_trainable(largest[key]):
                largest[key] = pack
        return list(largest.values())

    def gpu_memory(self, pack: Pack) -> "MemoryEstimate | None":
        """The peak memory of a worker with a GPU. The estimate takes seconds for a base of 1B parameters.

        Rows and prompts count as long as the longest, as in a worker; without the rows, as `data.max_length` tokens.
        None if the memory cannot be derived from shapes.
        """
        # Imported here because it imports transformers, and every process imports this module.
        from loragrid.planning.memory_estimate import ScoringShape, estimate_memory

        first, workers = pack.trials[0], self.experiment.workers
        rows = self.rows.get((first.model, first.data))
        num_prompts = max(first.data.num_eval, first.data.num_test) if rows is None else rows.num_prompts
        try:
            return estimate_memory(
                load_meta_model(first.model),
                [trial.method for trial in pack.trials],
                num_rows=first.training.rows_at_once(workers.num_workers),
                length=self.row_length(first),
                mode=self.gpu_engine(pack).mode,
                activation_checkpointing=first.training.activation_checkpointing,
                num_shares=workers.num_workers if workers.strategy == "shard" else 1,
                scoring=ScoringShape.of(
                    first.task,
                    length=first.data.max_length if rows is None else rows.scored_length,
                    prompt=first.data.max_length if rows is None else rows.longest_prompt,
                    num_prompts=math.ceil(num_prompts / workers.num_workers),
                ),
            )
        except NotImplementedError:
            return None

    def _num_trainable(self, pack: Pack) -> int:
        return sum(self.counts[trial.trial_id].trainable for trial in pack.trials)

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON can hold it: rows, trials, packs and the memory of the largest packs in bytes.

        `confirm_at_most` holds the same of the trials that would confirm; None if the experiment confirms nothing.
        """
        found: dict[str, object] = {"name": self.experiment.name, "question": self.experiment.question}
        confirm = None if self.confirm is None else self.confirm._parts_as_dict()
        data = [
            {"model": model.name, "data": data.name, **rows.record.to_dict(), "lines": rows.record.lines()}
            for (model, data), rows in self.rows.items()
        ]
        return found | {"rows": data} | self._parts_as_dict() | {"confirm_at_most": confirm}

    def _parts_as_dict(self) -> dict[str, object]:
        memory = {pack.pack_id: self.gpu_memory(pack) for pack in self.largest_packs()}
        pack_of = {trial.trial_id: pack.pack_id for pack in self.packs for trial in pack.trials}
        return {
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


def plan(experiment: Experiment, rows: "Mapping[tuple[ModelConfig, DataConfig], PlannedRows] | None" = None) -> Plan:
    """The plan of an experiment; starts nothing, reads no data and loads no weights.

    rows: what `read_rows` found; without them, lengths must be in steps, and every row counts as `data.max_length`.

    Raises:
        ValueError: the grid is impossible, also on these rows; the model is unknown; or the targets match none of its
            layers.
    """
    trials = expand(experiment)
    if rows is not None:
        known = rows
        trials = complete(trials, lambda trial: known[(trial.model, trial.data)].num_rows, experiment.early_stopping)
    found = Plan(
        experiment=experiment,
        trials=tuple(trials),
        counts={trial.trial_id: count_parameters(trial) for trial in trials},
        packs=tuple(
            group_into_packs(
                trials,
                experiment.pack,
                num_workers=experiment.workers.num_workers,
                early_stopping=experiment.early_stopping,
            )
        ),
        rows=rows or {},
    )
    dearest = most_expensive(found)
    if experiment.confirm is None or not dearest:
        return found
    seeds = fresh_seeds({trial.seed for trial in trials}, experiment.confirm.seeds)
    return replace(found, confirm=plan_confirmation(found, dearest, seeds))


def plan_confirmation(the_plan: Plan, chosen: Sequence[Trial], seeds: Sequence[int]) -> Plan:
    """The plan of the trials that confirm: each chosen setting with each fresh seed, never stopped early.

    chosen: one trial of the plan for each setting.
    """
    experiment = the_plan.experiment.model_copy(update={"early_stopping": None, "confirm": None})
    trials = confirm_trials(chosen, seeds)
    packs = group_into_packs(trials, experiment.pack, num_workers=experiment.workers.num_workers)
    per_setting = [the_plan.counts[trial.trial_id] for trial in chosen for _ in seeds]
    return Plan(
        experiment=experiment,
        trials=trials,
        counts={trial.trial_id: count for trial, count in zip(trials, per_setting, strict=True)},
        packs=tuple(packs),
        rows=the_plan.rows,
    )


def can_be_confirmed(the_plan: Plan, trial: Trial) -> bool:
    """Whether fresh seeds can change the trial's figures: they cannot if its method trains nothing."""
    return the_plan.counts[trial.trial_id].trainable > 0


def most_expensive(the_plan: Plan) -> list[Trial]:
    """For each method on each model and data set, a trial of the setting that trains the most tokens, then parameters.

    Methods that train nothing are left out.
    """
    found: dict[object, tuple[tuple[int, int], Trial]] = {}
    for trial in the_plan.trials:
        training = trial.training
        num_tokens = training.num_steps * training.batch_size * the_plan.row_length(trial)
        cost = (num_tokens, the_plan.counts[trial.trial_id].trainable)
        key = (trial.label or trial.method.name, trial.model, trial.data)
        if can_be_confirmed(the_plan, trial) and (key not in found or cost > found[key][0]):
            found[key] = (cost, trial)
    return [trial for _, trial in found.values()]


def count_parameters(trial: Trial) -> ParameterCount:
    """The trial's exact parameter counts, from the shapes of the base.

    Raises:
        ValueError: see `plan`; the message names the trial's method.
    """
    base = base_shape(trial.model)
    try:
        return trial.method.num_parameters(base.layers, base.num_parameters)
    except ValueError as error:
        raise ValueError(f"methods: {trial.method.name}: {error}") from error


@lru_cache(maxsize=8)
def base_shape(model: ModelConfig) -> BaseShape:
    """The adaptable layers and the size of the base, from its configuration."""
    base = load_meta_model(model)
    return BaseShape(
        layers=adaptable_layers(base, base.get_output_embeddings()),
        num_parameters=sum(parameter.numel() for parameter in base.parameters()),
    )
