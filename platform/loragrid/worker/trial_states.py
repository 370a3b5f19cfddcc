"""The trials of a worker that have not ended: their states from pack to pack, saved on the way, and their ends."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from loragrid.evaluation.row_scores import RowScores
from loragrid.training.failure import Failure
from loragrid.training.member_state import MemberState, put_member, take_member
from loragrid.training.step import PackModel
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import SavedTrial, TrialStore
from loragrid.worker.export import export_member
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.reporter import PackReports

# Where the experiment does not say how often, states are saved so that no more than this is lost.
SAVE_EVERY_SECONDS = 300.0


class OpenTrials:
    """`states`: trial id -> the state of a member outside its pack. Worker 0 alone writes into `store`.

    What cannot be written is the failure of its own trial, where the workplace isolates failures.
    """

    def __init__(
        self,
        store: TrialStore,
        reports: PackReports,
        place: ProcessGroup,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.states: dict[str, MemberState] = {}
        self.reports, self.place = reports, place
        self._store, self._clock = store, clock
        self._last_saved = clock()

    def restore(self, trial_id: str, saved: SavedTrial) -> None:
        """Take up where workers that are gone have left a trial."""
        self.states[trial_id] = saved.state
        self.reports.restore(trial_id, saved)

    def put_into(self, model: PackModel, trials: Sequence[Trial]) -> None:
        """Let a fresh pack's members go on where their trials are."""
        model.pack.clock.worker = self.place.worker
        for member, trial in enumerate(trials):
            if trial.trial_id in self.states:
                state = self.states[trial.trial_id]
                put_member(model, member, state)
                model.completed = state.completed
        model.pack.after_load()

    def keep(self, model: PackModel, member: int, trial: Trial) -> None:
        """The trial goes on later, in another pack."""
        self.states[trial.trial_id] = take_member(model, member)

    def end(
        self, pack: Pack, ended: Mapping[str, TrialEnd], tags: Mapping[str, str], *, pack_goes_on: bool = False
    ) -> None:
        """Trials of the pack end without having finished."""
        self.reports.count_seconds(pack)
        for trial_id in ended:
            self.states.pop(trial_id, None)
        self.reports.ended(pack, ended, tags, pack_goes_on=pack_goes_on)

    @property
    def are_due_to_be_saved(self) -> bool:
        """Whether `SAVE_EVERY_SECONDS` have passed since they were saved."""
        return self._clock() - self._last_saved >= SAVE_EVERY_SECONDS

    def save(self, trial_id: str, state: MemberState) -> Failure | None:
        """Write a trial's state; gives what goes wrong, where that can stay the trial's own."""
        try:
            if self.place.worker == 0:
                self._store.save(trial_id, self.reports.saved(trial_id, state))
            return None
        except OSError as error:
            if not self.place.isolate_failures:
                raise
            return Failure.of(error)

    def save_members(self, pack: Pack, model: PackModel) -> None:
        """Write every member's state; a member whose state cannot be written ends."""
        self.reports.count_seconds(pack)
        self._last_saved = self._clock()
        if self.place.worker != 0:
            return
        for member, trial in enumerate(pack.trials):
            if self.reports.has_ended(trial.trial_id):
                continue
            failure = self.save(trial.trial_id, take_member(model, member))
            if failure is not None:
                model.active[member] = False
                self.end(pack, {trial.trial_id: failure.end()}, failure.tags(), pack_goes_on=True)

    def export(self, model: PackModel, member: int, trial: Trial, scores: RowScores | None) -> TrialEnd:
        """Leave a finished trial's adapter, and its scores on the test rows, in the store; gives its end."""
        if self.place.worker == 0:
            try:
                adapter = partial(export_member, model, member, trial.model.name)
                self._store.save_output(trial.trial_id, "adapter", adapter)
                if scores is not None:
                    self._store.save_output(trial.trial_id, "scores", partial(scores.write, "test"))
            except OSError as error:
                if not self.place.isolate_failures:
                    raise
                return Failure.of(error).end()
        return TrialEnd(status="FINISHED")
