"""Measures the costs of trials in packs of one, once for all trials of equal shape, and all shapes in turns."""

from collections.abc import Mapping, Sequence

from loragrid.data.dataset import TokenizedData
from loragrid.planning.solo_run import HELD_PARTS, SoloRun, take_turns
from loragrid.planning.timing import cost_shape
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
from loragrid.worker.room import have_room
from loragrid.worker.trial_log import TrialLogs

# The parts of a trial's memory besides the base and the loss. In a pack these add up over the members.
_OF_EACH_MEMBER = (*HELD_PARTS, "memory/saved_activation_bytes")


class SoloFigures:
    """Measures trials in packs of one, and sends their figures."""

    def __init__(
        self, inputs: PackInputs, resident: ResidentBase, trials: OpenTrials, logs: TrialLogs, reporter: Reporter
    ) -> None:
        self._inputs, self._resident, self._trials = inputs, resident, trials
        self._logs, self._reporter = logs, reporter
        self._figures: dict[str, dict[str, float]] = {}
        self._expected: tuple[Trial, ...] = ()

    def expect(self, trials: Sequence[Trial]) -> None:
        """Trials of the queue: their shapes are measured together with those of the first pack on their base."""
        self._expected = tuple(trials)

    def measure(self, pack: Pack, group: ProcessGroup) -> tuple[Trial, ...]:
        """Measure each shape of trial once and send the figures of every trial; return the trials that can be trained.

        Nothing is compiled for a measurement: a pack that will be compiled is measured as a graph. Trials whose
        measurement fails end here.
        """
        if pack.trials[0].training.measure_steps == 0:
            return pack.trials
        same_shape: dict[str, list[Trial]] = {}
        for trial in pack.trials:
            same_shape.setdefault(cost_shape(trial), []).append(trial)
        same_shape = {key: trials for key, trials in same_shape.items() if not self._are_measured(trials)}
        able = {trial.trial_id for trial in pack.trials if self._logs[trial.trial_id].is_measured}
        failures = self._measure_shapes({key: trials[0] for key, trials in same_shape.items()}, pack, group)
        for key, alike in same_shape.items():
            if key in failures:
                failure = failures[key]
                self._trials.end(pack, {trial.trial_id: failure.end() for trial in alike}, failure.tags())
                continue
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

    def _measure_shapes(self, wanted: Mapping[str, Trial], pack: Pack, group: ProcessGroup) -> dict[str, Failure]:
        """Measure the wanted shapes that are not known yet, in turns with those of later packs; return the failures.

        wanted: shape -> a trial of it. A shape of a later pack that fails is measured again with its own pack.
        """
        missing = {key: trial for key, trial in wanted.items() if key not in self._figures}
        if not missing:
            return {}
        missing = {**missing, **{key: trial for key, trial in self._ahead(pack).items() if key not in missing}}
        turns = _Turns(pack=pack, group=group, resident=self._resident, reporter=self._reporter)
        for number, (key, trial) in enumerate(missing.items(), start=1):
            self._reporter.phase(pack, f"measuring {_label(trial)} in a pack of one ({number} of {len(missing)})")
            self._inputs.load_base(pack)
            turns.add(key, trial, self._inputs.rows(pack))
        turns.take(pack.trials[0].training.measure_steps)
        self._figures |= turns.figures
        return turns.failures

    def _ahead(self, pack: Pack) -> dict[str, Trial]:
        """Shape -> trial, for expected trials of other packs that can take turns with those of this pack."""
        first, found = pack.trials[0], dict[str, Trial]()
        if not first.method.packable:
            return {}
        for trial in self._expected:
            log, key = self._logs[trial.trial_id], cost_shape(trial)
            is_open = not (log.has_ended or log.is_measured or key in self._figures)
            is_alike = (trial.model, trial.data) == (first.model, first.data)
            is_alike = is_alike and trial.training.measure_steps == first.training.measure_steps
            if is_open and is_alike and trial.method.packable:
                found.setdefault(key, trial)
        return found


class _Turns:
    """Runs of several shapes on one base, as many at a time as memory holds; those take turns.

    figures, failures: by shape, once the shape has been measured.
    """

    def __init__(self, *, pack: Pack, group: ProcessGroup, resident: ResidentBase, reporter: Reporter) -> None:
        self._pack, self._group, self._resident, self._reporter = pack, group, resident, reporter
        self._runs: dict[str, SoloRun] = {}
        self.figures: dict[str, dict[str, float]] = {}
        self.failures: dict[str, Failure] = {}

    def add(self, key: str, trial: Trial, data: TokenizedData) -> None:
        """Measure the trial's memory, and let it take turns with the others. Its base must be loaded."""
        if self._runs and not self._have_room():
            self.take(trial.training.measure_steps)
        made = self._make(trial, data)
        if isinstance(made, Failure) and made.out_of_memory and self._runs:
            self.take(trial.training.measure_steps)  # the others may have held the memory that was missing
            made = self._make(trial, data)
        if isinstance(made, Failure):
            free_unused_memory(self._group.device)
            self.failures[key] = made
        else:
            self._runs[key] = made

    def take(self, num_rounds: int) -> None:
        """Time the runs that were added, and free their memory."""
        if not self._runs:
            return
        keys = {id(run): key for key, run in self._runs.items()}
        if len(keys) > 1:
            self._reporter.phase(self._pack, f"timing {len(keys)} shapes in turns")

        def at_failure(run: SoloRun, error: Exception) -> None:
            if not self._group.outlives(error):
                raise error
            self.failures[keys[id(run)]] = Failure.of(error)

        shared = take_turns(list(self._runs.values()), num_rounds, at_failure)
        for key, run in self._runs.items():
            if key not in self.failures:
                self.figures[key] = run.figures() | shared
        trials = [run.trial for run in self._runs.values()]
        self._runs = {}
        self._resident.release_if_written(trials)
        free_unused_memory(self._group.device)

    def _make(self, trial: Trial, data: TokenizedData) -> SoloRun | Failure:
        base = self._resident.load(trial, data)
        try:
            return SoloRun(
                trial,
                base,
                data,
                num_workers=self._group.num_workers,
                step_runner=self._resident.solo_step_runner(trial, data.train.input_ids.shape[1]),
                beside=list(self._runs.values()),
            )
        except Exception as error:
            if not self._group.outlives(error):
                raise
            self._resident.release_if_written([trial])
            return Failure.of(error)

    def _have_room(self) -> bool:
        """Whether another run, up to twice as large as the largest so far, fits beside those there are."""
        runs = self._runs.values()
        largest = max(max(run.needed_bytes, run.reserved_bytes) for run in runs)
        # What the allocator keeps for a captured step counts as free, but no other step can use it.
        return have_room(self._group, 2 * largest + sum(run.reserved_bytes for run in runs))


def _label(trial: Trial) -> str:
    rank = trial.method.hyperparameters().get("rank")
    return trial.method.name if rank is None else f"{trial.method.name} rank {rank}"
