"""Measures the costs of trials in packs of one, once for all trials of equal shape."""

from collections.abc import Sequence

from loragrid.planning.solo_run import measure_solo
from loragrid.training.failure import Failure
from loragrid.training.loss import CHUNK_ROWS
from loragrid.training.meters import free_unused_memory
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.open_trials import OpenTrials
from loragrid.worker.pack_inputs import PackInputs
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.reporter import Reporter
from loragrid.worker.resident_base import ResidentBase
from loragrid.worker.trial_log import TrialLogs

# The parts of a trial's memory besides the base and the loss. In a pack these add up over the members.
_OF_EACH_MEMBER = (
    "memory/adapter_bytes",
    "memory/gradient_bytes",
    "memory/optimizer_bytes",
    "memory/saved_activation_bytes",
)


class SoloFigures:
    """Measures trials in packs of one, and sends their figures."""

    def __init__(
        self, inputs: PackInputs, resident: ResidentBase, trials: OpenTrials, logs: TrialLogs, reporter: Reporter
    ) -> None:
        self._inputs, self._resident, self._trials = inputs, resident, trials
        self._logs, self._reporter = logs, reporter
        self._figures: dict[object, dict[str, float]] = {}

    def measure(self, pack: Pack, group: ProcessGroup) -> tuple[Trial, ...]:
        """Measure each shape of trial once and send the figures of every trial; return the trials that can be trained.

        Nothing is compiled for a measurement: a pack that will be compiled is measured as a graph. Trials whose
        measurement fails end here.
        """
        if pack.trials[0].training.measure_steps == 0:
            return pack.trials
        same_shape: dict[object, list[Trial]] = {}
        for trial in pack.trials:
            same_shape.setdefault(_shape(trial), []).append(trial)
        same_shape = {key: trials for key, trials in same_shape.items() if not self._are_measured(trials)}
        able = {trial.trial_id for trial in pack.trials if self._logs[trial.trial_id].is_measured}
        for index, (key, alike) in enumerate(same_shape.items()):
            if key not in self._figures:
                number = f"{index + 1} of {len(same_shape)}"
                self._reporter.phase(pack, f"measuring {_label(alike[0])} in a pack of one ({number})")
                measured = self._measure_one(alike[0], pack, group)
                if isinstance(measured, Failure):
                    free_unused_memory(group.device)
                    self._trials.end(pack, {trial.trial_id: measured.end() for trial in alike}, measured.tags())
                    continue
                self._figures[key] = measured
            able |= {trial.trial_id for trial in alike}
            unmeasured = [trial.trial_id for trial in alike if not self._logs[trial.trial_id].is_measured]
            self._reporter.figures(pack, dict.fromkeys(unmeasured, self._figures[key]))
        return tuple(trial for trial in pack.trials if trial.trial_id in able)

    def bytes_together(self, trials: Sequence[Trial], num_labels: int, num_workers: int) -> float | None:
        """The bytes that the trials hold besides the base in a common step, from those of each in a pack of one.

        Losses are computed chunk by chunk over all members' rows, so only one chunk is in memory. None if not all of
        the trials have been measured. `num_labels`: label positions per row.
        """
        if not self._are_measured(trials):
            return None
        known = [self._logs[trial.trial_id].figures for trial in trials]
        num_rows = [trial.training.rows_at_once(num_workers) * num_labels for trial in trials]
        chunk = min(sum(num_rows), CHUNK_ROWS) / sum(min(rows, CHUNK_ROWS) for rows in num_rows)
        loss = chunk * sum(own["memory/loss_bytes"] for own in known)
        return loss + sum(own[part] for own in known for part in _OF_EACH_MEMBER)

    def _are_measured(self, trials: Sequence[Trial]) -> bool:
        return all(self._logs[trial.trial_id].is_measured for trial in trials)

    def _measure_one(self, trial: Trial, pack: Pack, group: ProcessGroup) -> dict[str, float] | Failure:
        """The trial's figures, or the failure of its measurement."""
        base, data = self._inputs.load_base(pack), self._inputs.rows(pack)
        try:
            return measure_solo(
                trial,
                base,
                data,
                num_steps=trial.training.measure_steps,
                num_workers=group.num_workers,
                step_runner=self._resident.solo_step_runner(trial, data.train.input_ids.shape[1]),
            )
        except Exception as error:
            if not group.outlives(error):
                raise
            return Failure.of(error)
        finally:
            self._resident.release_if_written([trial])


def _shape(trial: Trial) -> object:
    """The trial's shape, which decides its costs; LoRA+ and LoRA have one shape because only learning rates differ."""
    sizes = (trial.method.stack_key(), trial.method.peft_config().get("r"))
    training = trial.training
    settings = (training.batch_size, training.micro_batch_size, training.activation_checkpointing)
    return (trial.model, trial.data, settings, sizes)


def _label(trial: Trial) -> str:
    rank = trial.method.hyperparameters().get("rank")
    return trial.method.name if rank is None else f"{trial.method.name} rank {rank}"
