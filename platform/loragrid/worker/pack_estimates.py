"""Estimates the memory that a pack needs on a GPU, once for all packs of equal shape."""

import math
from collections.abc import Sequence

import torch

from loragrid.data.dataset import TokenizedData
from loragrid.evaluation.task_scorer import TaskScorer
from loragrid.models.loading import load_meta_model
from loragrid.planning.memory_estimate import MemoryEstimate, ScoringShape, estimate_memory
from loragrid.training.step_mode import Mode
from loragrid.trials.trial import Trial


class PackEstimates:
    """Memory estimates of a worker's packs; `num_shares`: the workers over which the base is sharded."""

    def __init__(self, device: torch.device, num_workers: int, num_shares: int) -> None:
        self._device, self._num_workers, self._num_shares = device, num_workers, num_shares
        self._known: dict[object, MemoryEstimate | None] = {}

    def of(
        self, trials: Sequence[Trial], data: TokenizedData, mode: Mode, task: TaskScorer | None
    ) -> MemoryEstimate | None:
        """The bytes that a pack of these trials holds at its peak, by part; `task`: the scorer of its task, if any.

        None on a CPU, and for methods whose memory does not follow from shapes.
        """
        if self._device.type != "cuda":
            return None
        num_rows = trials[0].training.rows_at_once(self._num_workers)
        sizes = tuple((trial.method.stack_key(), trial.method.hyperparameters().get("rank")) for trial in trials)
        again = trials[0].training.activation_checkpointing
        length, scoring = data.train.input_ids.shape[1], _scoring_shape(data, task, self._num_workers)
        key = (trials[0].model, sizes, num_rows, length, scoring, mode, again)
        if key not in self._known:
            try:
                self._known[key] = estimate_memory(
                    load_meta_model(trials[0].model),
                    [trial.method for trial in trials],
                    num_rows=num_rows,
                    length=length,
                    mode=mode,
                    activation_checkpointing=again,
                    num_shares=self._num_shares,
                    scoring=scoring,
                )
            except NotImplementedError:
                self._known[key] = None
        return self._known[key]


def _scoring_shape(data: TokenizedData, task: TaskScorer | None, num_workers: int) -> ScoringShape:
    lengths = [data.train.input_ids.shape[1]]  # the same in every split
    if data.held_out_text is not None:
        lengths.append(data.held_out_text.input_ids.shape[1])
    if task is None:
        return ScoringShape(length=max(lengths))
    if task.task.generation is None:
        lengths.append(task.longest_row)
    num_prompts = math.ceil(task.num_questions / num_workers)
    return ScoringShape.of(task.task, length=max(lengths), prompt=task.longest_prompt, num_prompts=num_prompts)
