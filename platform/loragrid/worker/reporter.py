"""What a worker says of the packs it trains: every step once, every tag when it changes, every end with its times."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol

from loragrid.training.loop import Report
from loragrid.training.member_state import MemberState
from loragrid.training.meters import Stopwatch
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.packing import Pack
from loragrid.trials.tags import SPLIT_TAG
from loragrid.worker.checkpoints import SavedTrial
from loragrid.worker.messages import PackUpdate, split_tags


class SendUpdate(Protocol):
    """Hands an update on; every worker calls it equally often, worker 0 is heard."""

    def __call__(self, update: PackUpdate) -> None: ...


class PackReports:
    """Turns what happens to packs into updates, whichever pack a trial is in.

    `stopwatch` counts the phases of whatever pack is trained, `send` among them.
    """

    def __init__(self, send: SendUpdate, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.stopwatch = Stopwatch(clock)
        self._send_untimed = send
        self.until = 0
        """The step at which the packs that report stop for now."""
        self.ended_trials: set[str] = set()
        self.environment: Mapping[str, str] = {}
        """Tags of whatever trains from now on: the worker, its base and its rows."""
        self._records: dict[str, list[dict[str, float]]] = {}
        self._latest: dict[str, dict[str, float]] = {}
        self._figures: dict[str, dict[str, float]] = {}
        self._rankings: dict[str, dict[int, list[str]]] = {}
        self._tags: dict[str, dict[str, str]] = {}
        self._seconds: dict[str, dict[str, float]] = {}

    def phase(self, pack: Pack, name: str) -> None:
        """The pack is at something that takes a while."""
        self._send(self._update(pack, name, steps=self.until))

    def figures(self, pack: Pack, figures: Mapping[str, dict[str, float]]) -> None:
        """Figures that trials of the pack have once, by trial id."""
        for trial_id, found in figures.items():
            self._figures.setdefault(trial_id, {}).update(found)
        self._send(self._update(pack, "measured", figures=figures))

    def split(self, half: Pack, whole: Pack, reason: str) -> None:
        """The pack is part of one that was halved."""
        self._send(self._update(half, "waiting", tags=self._new_tags(half, split_tags(half, whole, reason))))

    def is_split(self, pack: Pack) -> bool:
        """Whether the pack is part of one that was halved: its trials' seconds are those of the whole, too."""
        return any(SPLIT_TAG in self._tags.get(trial.trial_id, {}) for trial in pack.trials)

    def ended(
        self, pack: Pack, ended: Mapping[str, TrialEnd], tags: Mapping[str, str], *, pack_goes_on: bool = False
    ) -> None:
        """Trials of the pack have ended without finishing."""
        if ended:
            own_tags = {trial_id: {**self.environment, **tags} for trial_id in ended}
            ends = self._with_seconds(ended)
            self._send(self._update(pack, "ended", tags=own_tags, ended=ends, done=not pack_goes_on))
            self.ended_trials |= ended.keys()

    def training(self, pack: Pack, report: Report, tags: Mapping[str, str]) -> None:
        """The training loop has reported."""
        self._send(self._training(pack, report, tags))

    def finished(
        self,
        pack: Pack,
        report: Report,
        tags: Mapping[str, str],
        *,
        ended: Mapping[str, TrialEnd],
        figures: Mapping[str, Mapping[str, float]],
    ) -> None:
        """The pack's last report, with figures by trial id."""
        update = self._training(pack, report, tags)
        found = {trial_id: dict(own) for trial_id, own in figures.items() if own}
        self._send(replace(update, ended=self._with_seconds(ended), figures=found, done=True))
        self.ended_trials |= ended.keys()

    def count_seconds(self, pack: Pack) -> None:
        """Count what the stopwatch has counted towards every trial of the pack."""
        seconds = self.stopwatch.take()
        for trial in pack.trials:
            known = self._seconds.setdefault(trial.trial_id, {})
            for phase, spent in seconds.items():
                known[phase] = known.get(phase, 0.0) + spent

    def saved(self, trial_id: str, state: MemberState) -> SavedTrial:
        """A trial's state with all that it has said."""
        return SavedTrial(
            state=state,
            records=self._records.get(trial_id, []),
            figures=self._figures.get(trial_id, {}),
            seconds=dict(self._seconds.get(trial_id, {})),
            rankings=self._rankings.get(trial_id, {}),
        )

    def restore(self, trial_id: str, saved: SavedTrial) -> None:
        """Take up where workers that are gone have left a trial."""
        self._records[trial_id] = list(saved.records)
        self._figures[trial_id] = dict(saved.figures)
        self._seconds[trial_id] = dict(saved.seconds)
        self._rankings[trial_id] = dict(saved.rankings)
        latest = self._latest.setdefault(trial_id, {})
        for record in saved.records:
            latest.update(record)

    def restored(self, pack: Pack, tags: Mapping[str, Mapping[str, str]]) -> None:
        """Say all that earlier workers may have said of the pack's trials: some of it may never have arrived."""
        records = {trial.trial_id: self._records.get(trial.trial_id, []) for trial in pack.trials}
        figures = {trial.trial_id: self._figures.get(trial.trial_id, {}) for trial in pack.trials}
        self._send(self._update(pack, "going on", records=records, figures=figures, tags=tags, steps=self.until))

    def rankings(self, trial_ids: Iterable[str], rung: int) -> list[list[str]]:
        """The comparisons that were made at a rung, each of all its trials, best first: one per queue."""
        known = (self._rankings.get(trial_id, {}).get(rung) for trial_id in trial_ids)
        return list({tuple(ranking): ranking for ranking in known if ranking is not None}.values())

    def rank(self, best: Iterable[str], ranking: list[str], rung: int) -> None:
        """Let those who go on from a rung remember how it was decided."""
        for trial_id in best:
            self._rankings.setdefault(trial_id, {})[rung] = ranking

    def has_ended(self, trial_id: str) -> bool:
        """Whether the trial's end has been told."""
        return trial_id in self.ended_trials

    def figures_of(self, trial_id: str) -> Mapping[str, float]:
        """What is known of the trial alone, also from earlier workers."""
        return self._figures.get(trial_id, {})

    def is_measured(self, trial_id: str) -> bool:
        """Whether the trial's own figures are known."""
        return "time/step_seconds" in self._figures.get(trial_id, {})

    def last_step(self, trial_id: str) -> int:
        """The last step at which the trial had a training loss; 0 where it had none."""
        steps = (int(record["step"]) for record in self._records.get(trial_id, []) if "train/loss" in record)
        return max(steps, default=0)

    def latest(self, trial_ids: Iterable[str], metric: str) -> dict[str, float]:
        """Trial id -> the latest figure, of those that have one."""
        found = {trial_id: self._latest.get(trial_id, {}).get(metric) for trial_id in trial_ids}
        return {trial_id: figure for trial_id, figure in found.items() if figure is not None}

    def _training(self, pack: Pack, report: Report, tags: Mapping[str, str]) -> PackUpdate:
        records: dict[str, list[dict[str, float]]] = {}
        for trial, found in zip(pack.trials, report.records, strict=True):
            if trial.trial_id in self.ended_trials:
                continue
            latest = self._latest.setdefault(trial.trial_id, {})
            for record in found:
                latest.update(record)
            known = self._records.setdefault(trial.trial_id, [])
            # A pack that was halved repeats steps that have been reported.
            new = [record for record in found if not known or record["step"] > known[-1]["step"]]
            if new:
                records[trial.trial_id] = new
                known += new
        return self._update(
            pack,
            "training",
            completed=report.completed,
            steps=self.until,
            records=records,
            tags=self._new_tags(pack, {**self.environment, **tags}),
        )

    def _new_tags(self, pack: Pack, tags: Mapping[str, str]) -> dict[str, dict[str, str]]:
        changed = {}
        for trial in pack.trials:
            known = self._tags.setdefault(trial.trial_id, {})
            new = {key: value for key, value in tags.items() if known.get(key) != value}
            if new:
                known |= new
                changed[trial.trial_id] = new
        return changed

    def _with_seconds(self, ended: Mapping[str, TrialEnd]) -> dict[str, TrialEnd]:
        return {
            trial_id: replace(end, seconds=dict(self._seconds.get(trial_id, {}))) for trial_id, end in ended.items()
        }

    def _send(self, update: PackUpdate) -> None:
        with self.stopwatch.phase("report") if self.stopwatch.is_running else nullcontext():
            self._send_untimed(update)

    def _update(self, pack: Pack, phase: str, **fields: object) -> PackUpdate:
        ids = tuple(trial.trial_id for trial in pack.trials)
        return PackUpdate(pack_id=pack.pack_id, trial_ids=ids, phase=phase, **fields)  # type: ignore[arg-type]
