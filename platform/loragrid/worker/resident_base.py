"""The base that a worker keeps on its device from pack to pack, and how packs run on it."""

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loragrid.config.experiment import DataConfig, EngineConfig, ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.evaluation.generation import NUM_TOKENS_TO_CHECK, check_generation
from loragrid.models.activation_checkpointing import checkpoint_activations
from loragrid.models.attention import fixed_attention, use_causal_attention
from loragrid.models.base_checks import check_base, check_rows
from loragrid.models.loading import load_base
from loragrid.models.sharding import shard_base, whole_head
from loragrid.models.vocabulary import check_vocabulary, embedding_rows
from loragrid.planning.timing import pack_shape
from loragrid.training.compilation import compile_layers, fuse_pieces, uncompile_layers
from loragrid.training.invariants import base_sums
from loragrid.training.meters import Stopwatch
from loragrid.training.step import PackModel
from loragrid.training.step_mode import ModeChoice, capture_obstacle, choose_mode, features_of_step
from loragrid.training.step_runner import StepRunner
from loragrid.trials.trial import Trial
from loragrid_methods import LayerShape
from loragrid_methods.stacks.targets import adaptable_layers


class ResidentBase:
    """Loads a base if another one is needed or a method has written the last one; decides how packs run on it."""

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
        """Checksums of the base's weights as they were loaded; None if no trial has asked for checks."""
        self._layers: list[LayerShape] = []
        self._attention_obstacle = self._capture_obstacle = ""
        self._compiled_for: object = None

    def has(self, trial: Trial) -> bool:
        """Whether the trial's base is loaded."""
        return self._base is not None and self._loaded == (trial.model, trial.data)

    def load(self, trial: Trial, data: TokenizedData) -> PreTrainedModel:
        """The trial's base on the device.

        Raises:
            ValueError: it cannot be loaded, lacks an id of the rows, would train wrongly (`check_base`), or must answer
                prompts and cannot process padded ones.
        """
        if self._base is not None and self.has(trial):
            checkpoint_activations(self._base, trial.training.activation_checkpointing)
            self._sum(self._base, trial)
            return self._base
        self.release()
        base = load_base(trial.model)
        # Before any forward: on a GPU, looking up an id that the embedding lacks ends the process.
        check_vocabulary(embedding_rows(base), None, data.id_bounds(), name=trial.model.name)
        self._layers = adaptable_layers(base, base.get_output_embeddings())
        length = data.train.input_ids.shape[1]
        if self._shard:
            # Checked while the base is whole. All workers check the same rows.
            check_base(base, length=length)
            _check_task(base, trial, data)
            shard_base(base, self.device)
        else:
            base.to(self.device)  # type: ignore[arg-type]  # transformers narrows torch's own signature
            check_base(base, length=length)
        # This also helps eager steps: no mask is built, and no key or value is repeated.
        rows = data.evaluation.input_ids[:2].to(self.device)
        with whole_head(base):
            self._attention_obstacle = use_causal_attention(base, rows) if self.device.type == "cuda" else ""
        # Attention that cannot be replaced may be capturable as it is; if it is not, the step runner records that.
        self._capture_obstacle = "" if fixed_attention(base) else self._attention_obstacle
        if not self._shard:
            if self.device.type == "cuda" and not self._attention_obstacle:
                check_rows(base)  # with the attention that has just replaced its own
            _check_task(base, trial, data)
        checkpoint_activations(base, trial.training.activation_checkpointing)
        self._base, self._loaded = base, (trial.model, trial.data)
        self._sum(base, trial)
        return base

    def shape_of(self, trials: Sequence[Trial]) -> str:
        """The shape under which timings of a pack of these trials on this base are recorded."""
        return pack_shape(trials, self._engine, self._num_workers, shard=self._shard)

    def release(self) -> None:
        """Drop the base, because a method has written it or another one replaces it."""
        if self._compiled_for is not None:
            torch.compiler.reset()  # compiled code keeps a reference to the base that it was compiled for
        self._base = self._loaded = self._compiled_for = self.sums = None
        if self._shard:
            gc.collect()  # FSDP's units and modules refer to each other, and would stay in memory beside the next base

    def release_if_written(self, trials: Sequence[Trial]) -> None:
        """Drop the base if a method of the trials that ran on it writes it."""
        if not all(trial.method.packable for trial in trials):
            self.release()

    def _sum(self, base: PreTrainedModel, trial: Trial) -> None:
        if self.sums is None and trial.training.check_every != 0:
            self.sums = base_sums(base)

    def choose_mode(self, trials: Sequence[Trial], length: int, num_steps: int) -> ModeChoice:
        """The mode in which `num_steps` steps of a pack with rows of `length` tokens run.

        With deterministic kernels the choice depends on the trials' total steps, not on the remaining steps or on code
        that is already compiled. Compiled kernels sum in another order, and workers that continue the pack must compute
        the same bits.
        """
        if self.device.type != "cuda":
            return ModeChoice(mode="eager", reason="no GPU")
        assert self._base is not None
        if self._engine.deterministic:
            num_steps = trials[0].training.num_steps
        obstacle = capture_obstacle((trial.method for trial in trials), shard=self._shard)
        num_tokens = len(trials) * trials[0].training.rows_per_worker(self._num_workers) * length
        composition = _composition(trials)
        choice = choose_mode(
            self._engine.mode,
            num_steps=num_steps,
            features_per_step=features_of_step(self._layers, num_tokens),
            num_stacks=len(set(composition[1:])),
            is_compiled=self._compiled_for == composition and not self._engine.deterministic,
            obstacle=obstacle or self._capture_obstacle,
        )
        return replace(choice, attention=self._attention_obstacle)

    def solo_step_runner(self, trial: Trial, length: int) -> StepRunner:
        """The step runner that measures a trial in a pack of one; nothing is compiled for it."""
        assert self._base is not None
        choice = self.choose_mode([trial], length, trial.training.num_steps)
        uncompile_layers(self._base)
        return StepRunner(choice if choice.mode == "eager" else replace(choice, mode="graph"))

    def step_runner(
        self, model: PackModel, trials: Sequence[Trial], choice: ModeChoice, stopwatch: Stopwatch
    ) -> StepRunner:
        """The step runner of a pack; packs of equal composition share the code that is compiled for them."""
        if choice.mode != "eager":
            fuse_pieces(model)
        composition = _composition(trials)
        if choice.mode != "compiled":
            uncompile_layers(model.base)
            return StepRunner(choice, stopwatch)
        if self._compiled_for != composition:
            torch.compiler.reset()
            self._compiled_for = composition
        compile_layers(model.base)
        return StepRunner(choice, stopwatch)


def _check_task(base: PreTrainedModel, trial: Trial, data: TokenizedData) -> None:
    if trial.task is not None and trial.task.generation is not None:
        row = data.evaluation.input_ids[0, : int(data.evaluation.num_tokens[0])]
        check_generation(base, row[:NUM_TOKENS_TO_CHECK].to(base.device), f"task.kind: {trial.task.kind}")


def _composition(trials: Sequence[Trial]) -> tuple[object, ...]:
    """Packs with equal composition can use the same compiled code."""
    return (trials[0].training.activation_checkpointing, *(trial.method.stack_key() for trial in trials))
