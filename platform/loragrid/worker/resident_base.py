"""The base that a worker keeps on its device from pack to pack, with what is known and compiled of it."""

import gc
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loragrid.config.experiment import DataConfig, EngineConfig, ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.evaluation.generation import check_left_padding
from loragrid.evaluation.task_scorer import TaskScorer
from loragrid.models.activation_checkpointing import checkpoint_activations
from loragrid.models.attention import use_causal_attention
from loragrid.models.loading import load_base, load_meta_model
from loragrid.models.sharding import shard_base, whole_head
from loragrid.planning.memory_estimate import MemoryEstimate, ScoringShape, estimate_memory
from loragrid.planning.timing import pack_shape
from loragrid.training.assembly import NUM_TOKENS_TO_CHECK, build_batches, check_logits
from loragrid.training.cuda_graphs import Engine, compile_layers, fuse_pieces, uncompile_layers
from loragrid.training.invariants import base_sums
from loragrid.training.meters import Stopwatch
from loragrid.training.step import PackModel
from loragrid.training.step_mode import EngineChoice, capture_obstacle, choose_mode, features_of_step
from loragrid.trials.trial import Trial
from loragrid_methods import LayerShape
from loragrid_methods.stacks.targets import adaptable_layers


class ResidentBase:
    """Loads a base when another is asked for, or after a method wrote the last one; decides how packs run on it."""

    def __init__(
        self,
        device: torch.device,
        engine: EngineConfig,
        num_workers: int,
        *,
        shard: bool = False,
    ) -> None:
        self.device = device
        self._engine, self._num_workers, self._shard = engine, num_workers, shard
        self._base: PreTrainedModel | None = None
        self._loaded: tuple[ModelConfig, DataConfig] | None = None
        self.sums: dict[str, Tensor] | None = None
        """The checksums of the base's weights as they were loaded; None where no trial asked for checks then."""
        self._layers: list[LayerShape] = []
        self._attention_obstacle = ""
        self._compiled_for: object = None
        self._estimates: dict[object, MemoryEstimate | None] = {}

    def has(self, trial: Trial) -> bool:
        """Whether the trial's base is there."""
        return self._base is not None and self._loaded == (trial.model, trial.data)

    def load(self, trial: Trial, data: TokenizedData) -> PreTrainedModel:
        """The trial's base on the device.

        Raises:
            ValueError: it cannot be loaded, does something to its logits that the loss would miss, or is to answer
                prompts and cannot do so side by side.
        """
        if self._base is not None and self.has(trial):
            checkpoint_activations(self._base, trial.training.activation_checkpointing)
            self._sum(self._base, trial)
            return self._base
        self.release()
        base = load_base(trial.model)
        self._layers = adaptable_layers(base, base.get_output_embeddings())
        if self._shard:
            # Where it still is whole. The batches are cut for one worker: all look at the same row.
            check_logits(base, build_batches([trial], data, base.device))
            _check_task(base, trial, data)
            shard_base(base, self.device)
        else:
            base.to(self.device)  # type: ignore[arg-type]  # transformers narrows torch's own signature
        # Also for eager steps: no mask is built, no key or value is repeated.
        rows = data.evaluation.input_ids[:2].to(self.device)
        with whole_head(base):
            self._attention_obstacle = use_causal_attention(base, rows) if self.device.type == "cuda" else ""
        if not self._shard:
            check_logits(base, build_batches([trial], data, self.device, num_workers=self._num_workers))
            _check_task(base, trial, data)
        checkpoint_activations(base, trial.training.activation_checkpointing)
        self._base, self._loaded = base, (trial.model, trial.data)
        self._sum(base, trial)
        return base

    def shape_of(self, trials: Sequence[Trial]) -> str:
        """What the seconds of a pack of these trials on this base are known by."""
        return pack_shape(trials, self._engine, self._num_workers, shard=self._shard)

    def release(self) -> None:
        """Forget the base: a method wrote it, or another takes its place."""
        if self._compiled_for is not None:
            torch._dynamo.reset()  # compiled code holds on to the base that it was compiled for
        self._base = self._loaded = self._compiled_for = self.sums = None
        if self._shard:
            gc.collect()  # FSDP's units and their modules hold each other, and the next base would come on top

    def release_if_written(self, trials: Sequence[Trial]) -> None:
        """Forget the base where a method of trials that ran on it writes it."""
        if not all(trial.method.packable for trial in trials):
            self.release()

    def _sum(self, base: PreTrainedModel, trial: Trial) -> None:
        if self.sums is None and trial.training.check_every != 0:
            self.sums = base_sums(base)

    def choose_mode(self, trials: Sequence[Trial], length: int, num_steps: int) -> EngineChoice:
        """How `num_steps` steps of a pack with rows of `length` tokens are run.

        With deterministic kernels all steps of its trials decide, not those that are left or what was compiled before:
        compiled kernels add up in another order, and whoever goes on with the pack must come to the same bits.
        """
        if self.device.type != "cuda":
            return EngineChoice(mode="eager", reason="no GPU")
        assert self._base is not None
        if self._engine.deterministic:
            num_steps = trials[0].training.steps
        obstacle = capture_obstacle((trial.method for trial in trials), shard=self._shard)
        num_tokens = len(trials) * trials[0].training.rows_per_worker(self._num_workers) * length
        composition = _composition(trials)
        return choose_mode(
            self._engine.mode,
            num_steps=num_steps,
            features_per_step=features_of_step(self._layers, num_tokens),
            num_stacks=len(set(composition[1:])),
            is_compiled=self._compiled_for == composition and not self._engine.deterministic,
            obstacle=obstacle or self._attention_obstacle,
        )

    def engine_alone(self, trial: Trial, length: int) -> Engine:
        """The engine that measures a trial by itself: nothing is compiled for it."""
        assert self._base is not None
        choice = self.choose_mode([trial], length, trial.training.steps)
        uncompile_layers(self._base)
        return Engine(choice if choice.mode == "eager" else replace(choice, mode="graph"))

    def engine(self, model: PackModel, trials: Sequence[Trial], choice: EngineChoice, stopwatch: Stopwatch) -> Engine:
        """The engine of a pack, with what it compiles; packs of equal composition share what the first compiled."""
        if choice.mode != "eager":
            fuse_pieces(model)
        composition = _composition(trials)
        if choice.mode != "compiled":
            uncompile_layers(model.base)
            return Engine(choice, stopwatch)
        if self._compiled_for != composition:
            torch._dynamo.reset()
            self._compiled_for = composition
        compile_layers(model.base)
        return Engine(choice, stopwatch)

    def estimate(
        self, trials: Sequence[Trial], data: TokenizedData, choice: EngineChoice, task: TaskScorer | None
    ) -> MemoryEstimate | None:
        """What the pack will hold on a GPU at its peak; None on a CPU, and where shapes alone do not tell.

        `task`: the scorer of its task, if any.
        """
        if self.device.type != "cuda":
            return None
        num_rows = trials[0].training.rows_at_once(self._num_workers)
        sizes = tuple((trial.method.stack_key(), trial.method.hyperparameters().get("rank")) for trial in trials)
        again = trials[0].training.activation_checkpointing
        length, scoring = data.train.input_ids.shape[1], _scoring_shape(data, task, self._num_workers)
        key = (trials[0].model, sizes, num_rows, length, scoring, choice.mode, again)
        if key not in self._estimates:
            try:
                self._estimates[key] = estimate_memory(
                    load_meta_model(trials[0].model),
                    [trial.method for trial in trials],
                    num_rows=num_rows,
                    length=length,
                    mode=choice.mode,
                    activation_checkpointing=again,
                    num_shares=self._num_workers if self._shard else 1,
                    scoring=scoring,
                )
            except NotImplementedError:
                self._estimates[key] = None
        return self._estimates[key]


def _check_task(base: PreTrainedModel, trial: Trial, data: TokenizedData) -> None:
    if trial.task is not None and trial.task.generation is not None:
        row = data.evaluation.input_ids[0, : int(data.evaluation.num_tokens[0])]
        check_left_padding(base, row[:NUM_TOKENS_TO_CHECK].to(base.device), trial.task.kind)


def _scoring_shape(data: TokenizedData, task: TaskScorer | None, num_workers: int) -> ScoringShape:
    lengths = [data.train.input_ids.shape[1]]  # every split's
    if data.held_out_text is not None:
        lengths.append(data.held_out_text.input_ids.shape[1])
    if task is None:
        return ScoringShape(length=max(lengths))
    if task.task.generation is None:
        lengths.append(task.longest_row)
    num_prompts = math.ceil(task.num_questions / num_workers)
    return ScoringShape.of(task.task, length=max(lengths), prompt=task.longest_prompt, num_prompts=num_prompts)


def _composition(trials: Sequence[Trial]) -> tuple[object, ...]:
    """What packs must have in common to run the same compiled code."""
    return (trials[0].training.activation_checkpointing, *(trial.method.stack_key() for trial in trials))
