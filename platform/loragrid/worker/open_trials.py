"""A worker's trials that have begun and not ended: keeps and saves their states between packs, and ends them."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from loragrid.evaluation.row_scores import RowScores
from loragrid.evaluation.sample_answers import MemberAnswers
from loragrid.training.failure import Failure
from loragrid.training.member_state import MemberState, put_member, take_member
from loragrid.training.step import PackModel
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.packing import Pack
from loragrid.trials.successive_halving import SettingScore
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.export import export_member
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.reporter import Reporter
from loragrid.worker.saved_trial import SavedTrial
from loragrid.worker.trial_log import TrialLog, TrialLogs

SAVE_EVERY_SECONDS = 300.0
"""How often states are saved if the experiment sets no interval: at most this much work is lost."""


class OpenTrials:
    """Keeps the states of members between their packs; worker 0 also writes them, and the adapters, into `store`.

    If `group` isolates failures, a state or adapter that cannot be written fails only its own trial.
    """

    def __init__(
        self,
        store: TrialStore,
        logs: TrialLogs,
        reporter: Reporter,
        group: ProcessGroup,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._states: dict[str, MemberState] = {}
        self._store, self._logs, self._reporter, self._group = store, logs, reporter, group
        self._clock = clock
        self._last_saved = clock()

    def __contains__(self, trial_id: str) -> bool:
        """Whether the trial has begun and not ended."""
        return trial_id in self._states

    def completed(self, trial: Trial) -> int:
        """The number of steps that the trial has completed."""
        return self._states[trial.trial_id].completed if trial.trial_id in self._states else 0

    def has_ended(self, trial_id: str) -> bool:
        """Whether the trial's end has been reported."""
        return self._logs[trial_id].has_ended

    def last_step(self, trial_id: str) -> int:
        """The last step for which the trial reported a training loss; 0 if there is none."""
        return self._logs[trial_id].last_step

    def was_split(self, pack: Pack) -> bool:
        """Whether the pack is part of a halved pack; its trials' seconds then include those spent in the whole pack."""
        return any(self._logs[trial.trial_id].was_split for trial in pack.trials)

    def remaining(self, pack: Pack, until: int) -> Iterator[Pack]:
        """The pack's trials that have neither ended nor reached step `until`, as one pack per reached step."""
        by_step: dict[int, list[Trial]] = {}
        for trial in self.without_ended(pack).trials:
            completed = self.completed(trial)
            if completed < until:
                by_step.setdefault(completed, []).append(trial)
        for index, trials in enumerate(by_step.values()):
            name = pack.pack_id if len(by_step) == 1 else f"{pack.pack_id}.{index}"
            yield replace(pack, pack_id=name, trials=tuple(trials))

    def without_ended(self, pack: Pack) -> Pack:
        """The pack without the trials that have ended."""
        return replace(pack, trials=tuple(trial for trial in pack.trials if not self.has_ended(trial.trial_id)))

    def restore(self, trial: Trial, saved: SavedTrial) -> None:
        """Continue a trial from where earlier workers saved it; without tensors if its method writes the base."""
        self._states[trial.trial_id] = saved.state
        self._logs[trial.trial_id] = TrialLog.of(saved)

    def put_into(self, model: PackModel, trials: Sequence[Trial]) -> None:
        """Load the trials' states into the members of a newly built pack."""
        model.pack.clock.worker = self._group.worker
        for member, trial in enumerate(trials):
            if trial.trial_id in self._states:
                state = self._whole_state(trial)
                put_member(model, member, state)
                model.completed = state.completed
        model.pack.after_load()

    def keep(self, model: PackModel, member: int, trial: Trial) -> None:
        """Keep a member's state: the trial continues later, in another pack.

        The state of a method that writes the base is as large as several bases, and all trials of a queue wait for each
        other at a rung. Its tensors are therefore kept in the store only, into which every state is saved at a rung.
        """
        self._states[trial.trial_id] = (
            take_member(model, member)
            if trial.method.packable
            else MemberState(completed=model.completed, active=bool(model.active[member]), tensors={})
        )

    def note_diverged(self, trial: Trial) -> None:
        """Remember that a trial of this setting has diverged: at the next rung the setting is last."""
        self._logs.diverged_settings.add(trial.setting_id)

    def forget(self, trial_ids: Iterable[str]) -> None:
        """Drop the states of trials that have ended."""
        for trial_id in trial_ids:
            self._states.pop(trial_id, None)

    def end(
        self, pack: Pack, ended: Mapping[str, TrialEnd], tags: Mapping[str, str], *, pack_goes_on: bool = False
    ) -> None:
        """End trials of the pack that have not finished."""
        self._reporter.count_seconds(pack)
        self.forget(ended)
        self._reporter.ended(pack, ended, tags, pack_goes_on=pack_goes_on)

    def _whole_state(self, trial: Trial) -> MemberState:
        """A kept state with its tensors, from the store if only that has them.

        Raises:
            OSError: the store no longer has the state.
        """
        state = self._states[trial.trial_id]
        if trial.method.packable:
            return state
        saved, damaged = self._store.load(trial.trial_id)
        if saved is None or saved.state.completed != state.completed:
            raise OSError("; ".join(damaged) or f"the state of step {state.completed} is no longer in the store")
        return saved.state

    def pass_rung(self, best: Sequence[Trial], ranking: list[SettingScore], rung: int) -> dict[str, TrialEnd]:
        """Save a ranking with the states of the trials that continue; return the ends of those it cannot save."""
        ends = {}
        for trial in best:
            self._logs[trial.trial_id].rankings[rung] = ranking
        for trial in best:
            failure = self._save(trial.trial_id, partial(self._whole_state, trial))
            if failure is not None:
                ends[trial.trial_id] = failure.end()
        return ends

    @property
    def are_due_to_be_saved(self) -> bool:
        """Whether `SAVE_EVERY_SECONDS` have passed since the states were last saved."""
        return self._clock() - self._last_saved >= SAVE_EVERY_SECONDS

    def save_members(self, pack: Pack, model: PackModel) -> None:
        """Write every member's state; a member whose state cannot be written ends."""
        self._reporter.count_seconds(pack)
        self._last_saved = self._clock()
        if self._group.worker != 0:
            return
        for member, trial in enumerate(pack.trials):
            if self.has_ended(trial.trial_id):
                continue
            failure = self._save(trial.trial_id, partial(take_member, model, member))
            if failure is not None:
                model.active[member] = False
                self.end(pack, {trial.trial_id: failure.end()}, failure.tags(), pack_goes_on=True)

    def export(
        self,
        model: PackModel,
        member: int,
        trial: Trial,
        scores: RowScores | None,
        samples: MemberAnswers | None,
        chat_template: str | None = None,
    ) -> TrialEnd:
        """Write a finished trial's adapter, scores on the test rows and sample answers into the store.

        chat_template: see `export_member`. Returns its end.
        """

        def write() -> None:
            adapter = partial(export_member, model, member, trial.model.name, chat_template=chat_template)
            self._store.save_output(trial.trial_id, "adapter", adapter)
            if scores is not None:
                self._store.save_output(trial.trial_id, "scores", partial(scores.write, "test"))
            if samples is not None:
                self._store.save_output(trial.trial_id, "samples", samples.write)

        failure = self._write(write)
        return TrialEnd(status="FINISHED") if failure is None else failure.end()

    def _save(self, trial_id: str, take_state: Callable[[], MemberState]) -> Failure | None:
        return self._write(lambda: self._store.save(trial_id, self._logs[trial_id].saved_with(take_state())))

    def _write(self, write: Callable[[], None]) -> Failure | None:
        """Let worker 0 write into the store; return the failure if only this trial must fail with it."""
        try:
            if self._group.worker == 0:
                write()
            return None
        except OSError as error:
            if not self._group.isolate_failures:
                raise
            return Failure.of(error)
