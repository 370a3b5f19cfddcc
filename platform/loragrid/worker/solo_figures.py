"""What the trials of a queue cost alone: measured once for all trials of equal shape, and sent for each of them."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from loragrid.data.dataset import TokenizedData
from loragrid.planning.solo_run import measure_solo
from loragrid.training.failure import Failure
from loragrid.training.loss import CHUNK_ROWS
from loragrid.training.meters import free_unused_memory
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.resident_base import ResidentBase
from loragrid.worker.trial_states import OpenTrials

# What a trial holds beside the base and its loss, by part: of a pack's members these add up.
_OF_EACH_MEMBER = (
    "memory/adapter_bytes",
    "memory/gradient_bytes",
    "memory/optimizer_bytes",
    "memory/saved_activation_bytes",
)


class SoloFigures:
    """The figures that are known of trials alone; `load` gives a pack's base on the device, from the `resident` one."""

    def __init__(
        self, open_trials: OpenTrials, resident: ResidentBase, load: Callable[[Pack], PreTrainedModel]
    ) -> None:
        self._open_trials, self._resident, self._load = open_trials, resident, load
        self._figures: dict[object, dict[str, float]] = {}

    def measure(self, pack: Pack, data: TokenizedData) -> tuple[Trial, ...]:
        """Send the solo figures of every trial, measured once for those of equal shape; the trials that could be.

        Nothing is compiled for them: a pack that will be is measured as a graph. Trials that fail alone end here.
        """
        if pack.trials[0].training.measure_steps == 0:
            return pack.trials
        reports = self._open_trials.reports
        same_shape: dict[object, list[Trial]] = {}
        for trial in pack.trials:
            same_shape.setdefault(_shape(trial), []).append(trial)
        same_shape = {key: trials for key, trials in same_shape.items() if not self._are_measured(trials)}
        able = {trial.trial_id for trial in pack.trials if reports.is_measured(trial.trial_id)}
        for index, (key, alike) in enumerate(same_shape.items()):
            if key not in self._figures:
                reports.phase(pack, f"measuring {_label(alike[0])} alone ({index + 1} of {len(same_shape)})")
                measured = self._measure_one(alike[0], pack, data)
                if isinstance(measured, Failure):
                    free_unused_memory(self._open_trials.place.device)
                    ends = {trial.trial_id: measured.end() for trial in alike}
                    self._open_trials.end(pack, ends, measured.tags())
                    continue
                self._figures[key] = measured
            able |= {trial.trial_id for trial in alike}
            figures = {t.trial_id: self._figures[key] for t in alike if not reports.is_measured(t.trial_id)}
            reports.figures(pack, figures)
        return tuple(trial for trial in pack.trials if trial.trial_id in able)

    def bytes_together(self, trials: Sequence[Trial], data: TokenizedData) -> float | None:
        """What the trials hold beside the base in a step taken together, from what each held alone.

        Of their losses a chunk is held at a time, whoever's rows are in it. None where not all of the trials have been
        measured.
        """
        reports = self._open_trials.reports
        if not all(reports.is_measured(trial.trial_id) for trial in trials):
            return None
        known = [reports.figures_of(trial.trial_id) for trial in trials]
        place, num_labels = self._open_trials.place, data.train.label_positions.shape[1]
        num_rows = [trial.training.rows_at_once(place.num_workers) * num_labels for trial in trials]
        chunk = min(sum(num_rows), CHUNK_ROWS) / sum(min(rows, CHUNK_ROWS) for rows in num_rows)
        loss = chunk * sum(own["memory/loss_bytes"] for own in known)
        return loss + sum(own[part] for own in known for part in _OF_EACH_MEMBER)

    def _are_measured(self, trials: Sequence[Trial]) -> bool:
        return all(self._open_trials.reports.is_measured(trial.trial_id) for trial in trials)

    def _measure_one(self, trial: Trial, pack: Pack, data: TokenizedData) -> dict[str, float] | Failure:
        """The figures of the trial alone, or what went wrong."""
        base = self._load(pack)
        place = self._open_trials.place
        try:
            return measure_solo(
                trial,
                base,
                data,
                num_steps=trial.training.measure_steps,
                num_workers=place.num_workers,
                engine=self._resident.engine_alone(trial, data.train.input_ids.shape[1]),
            )
        except Exception as error:
            if not place.outlives(error):
                raise
            return Failure.of(error)
        finally:
            self._resident.release_if_written([trial])


def _shape(trial: Trial) -> object:
    """Trials of equal shape cost the same: LoRA+ differs from LoRA in its learning rates alone."""
    sizes = (trial.method.stack_key(), trial.method.peft_config().get("r"))
    training = trial.training
    settings = (training.batch_size, training.micro_batch_size, training.activation_checkpointing)
    return (trial.model, trial.data, settings, sizes)


def _label(trial: Trial) -> str:
    rank = trial.method.hyperparameters().get("rank")
    return trial.method.name if rank is None else f"{trial.method.name} rank {rank}"
