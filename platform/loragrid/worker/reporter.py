"""Reports events of packs to the sweep: every step once, every tag when it changes, every end with its seconds."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol

from loragrid.training.loop import Report
from loragrid.training.meters import Stopwatch
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.packing import Pack
from loragrid.worker.messages import PackUpdate, split_tags
from loragrid.worker.trial_log import TrialLogs


class SendUpdate(Protocol):
    """Passes an update on. Every worker calls it equally often; only worker 0's updates arrive."""

    def __call__(self, update: PackUpdate) -> None: ...


class Reporter:
    """Turns events of packs into updates, enters them in the trials' logs, and sends them.

    `stopwatch` times the phases of the pack that is trained; the time that `send` takes counts as `report`.
    """

    def __init__(self, send: SendUpdate, logs: TrialLogs, stopwatch: Stopwatch) -> None:
        self._send_untimed, self._logs, self._stopwatch = send, logs, stopwatch
        self.until = 0
        """The step up to which packs are trained for now."""
        self.environment: Mapping[str, str] = {}
        """Tags of all trials that are trained from now on: worker, base, rows."""

    def phase(self, pack: Pack, name: str) -> None:
        """Report that the pack begins something that takes a while."""
        self._send(self._update(pack, name, steps=self.until))

    def figures(self, pack: Pack, figures: Mapping[str, dict[str, float]]) -> None:
        """Report figures that a trial has only once, not at every step; by trial id."""
        for trial_id, found in figures.items():
            self._logs[trial_id].figures.update(found)
        self._send(self._update(pack, "measured", figures=figures))

    def split(self, half: Pack, whole: Pack, reason: str) -> None:
        """Report that `half` is one half of `whole`, which failed."""
        self._send(self._update(half, "waiting", tags=self._new_tags(half, split_tags(half, whole, reason))))

    def ended(
        self, pack: Pack, ended: Mapping[str, TrialEnd], tags: Mapping[str, str], *, pack_goes_on: bool = False
    ) -> None:
        """Report that trials of the pack ended without finishing."""
        if ended:
            own_tags = {trial_id: {**self.environment, **tags} for trial_id in ended}
            ends = self._with_seconds(ended)
            self._send(self._update(pack, "ended", tags=own_tags, ended=ends, done=not pack_goes_on))
            self._logs.mark_ended(ended)

    def training(self, pack: Pack, report: Report, tags: Mapping[str, str]) -> None:
        """Pass on a report of the training loop."""
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
        """Pass on the pack's last report, with figures by trial id."""
        update = self._training(pack, report, tags)
        found = {trial_id: dict(own) for trial_id, own in figures.items() if own}
        self._send(replace(update, ended=self._with_seconds(ended), figures=found, done=True))
        self._logs.mark_ended(ended)

    def restored(self, pack: Pack, tags: Mapping[str, Mapping[str, str]]) -> None:
        """Repeat everything that earlier workers may have reported about the pack: some of it may not have arrived."""
        records = {trial.trial_id: self._logs[trial.trial_id].records for trial in pack.trials}
        figures = {trial.trial_id: self._logs[trial.trial_id].figures for trial in pack.trials}
        self._send(self._update(pack, "going on", records=records, figures=figures, tags=tags, steps=self.until))

    def count_seconds(self, pack: Pack) -> None:
        """Add the stopwatch's seconds since the last call to every trial of the pack."""
        seconds = self._stopwatch.take()
        for trial in pack.trials:
            self._logs[trial.trial_id].add_seconds(seconds)

    def _training(self, pack: Pack, report: Report, tags: Mapping[str, str]) -> PackUpdate:
        records: dict[str, list[dict[str, float]]] = {}
        for trial, found in zip(pack.trials, report.records, strict=True):
            log = self._logs[trial.trial_id]
            if not log.has_ended and (new := log.add_records(found)):
                records[trial.trial_id] = new
        return self._update(
            pack,
            "training",
            completed=report.completed,
            steps=self.until,
            records=records,
            tags=self._new_tags(pack, {**self.environment, **tags}),
        )

    def _new_tags(self, pack: Pack, tags: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The tags that are new or changed, by trial id; trials without any are left out."""
        changed = {trial.trial_id: self._logs[trial.trial_id].add_tags(tags) for trial in pack.trials}
        return {trial_id: new for trial_id, new in changed.items() if new}

    def _with_seconds(self, ended: Mapping[str, TrialEnd]) -> dict[str, TrialEnd]:
        return {trial_id: replace(end, seconds=dict(self._logs[trial_id].seconds)) for trial_id, end in ended.items()}

    def _send(self, update: PackUpdate) -> None:
        with self._stopwatch.phase("report") if self._stopwatch.is_running else nullcontext():
            self._send_untimed(update)

    def _update(self, pack: Pack, phase: str, **fields: object) -> PackUpdate:
        ids = tuple(trial.trial_id for trial in pack.trials)
        return PackUpdate(pack_id=pack.pack_id, trial_ids=ids, phase=phase, **fields)  # type: ignore[arg-type]
