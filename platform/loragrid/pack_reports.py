"""What a worker says of the packs it trains: every step once, every tag when it changes, every end with its times."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from loragrid.messages import PackUpdate, TrialEnd
from loragrid.planning import Pack
from loragrid.training import Report


class SendUpdate(Protocol):
    """Hands an update on, and with it the files in `folder`; every worker calls it equally often, worker 0 is heard."""

    def __call__(self, update: PackUpdate, folder: Path | None = None) -> None: ...


class PackReports:
    """Turns what happens to packs into updates, whichever pack a trial is in."""

    def __init__(self, send: SendUpdate) -> None:
        self._send = send
        self.until = 0
        """The step at which the packs that report stop for now."""
        self._reported_step: dict[str, int] = {}
        self._latest: dict[str, dict[str, float]] = {}
        self._tags: dict[str, dict[str, str]] = {}
        self._seconds: dict[str, dict[str, float]] = {}

    def phase(self, pack: Pack, name: str) -> None:
        """The pack is at something that takes a while."""
        self._send(self._update(pack, name, steps=self.until))

    def figures(self, pack: Pack, figures: Mapping[str, dict[str, float]]) -> None:
        """Figures that trials of the pack have once, by trial id."""
        self._send(self._update(pack, "measured", figures=figures))

    def split(self, pack: Pack, reason: str) -> None:
        """The pack is part of one that was halved."""
        tags = {"loragrid.pack": pack.pack_id, "loragrid.pack.split": reason}
        self._send(self._update(pack, "waiting", tags=self._new_tags(pack, tags)))

    def ended(self, pack: Pack, ended: Mapping[str, TrialEnd], tags: Mapping[str, str]) -> None:
        """Trials of the pack have ended without finishing."""
        if ended:
            own_tags = {trial_id: dict(tags) for trial_id in ended}
            self._send(self._update(pack, "ended", tags=own_tags, ended=self._with_seconds(ended), done=True))

    def training(self, pack: Pack, report: Report, tags: Mapping[str, str], folder: Path | None = None) -> None:
        """The training loop has reported; `folder` holds a checkpoint."""
        self._send(self._training(pack, report, tags), folder)

    def finished(
        self,
        pack: Pack,
        report: Report,
        tags: Mapping[str, str],
        *,
        ended: Mapping[str, TrialEnd],
        figures: dict[str, float],
        folder: Path,
    ) -> None:
        """The pack's last report; `figures` hold for all its members, `folder` for those who ended in it."""
        update = self._training(pack, report, tags)
        all_figures = {trial.trial_id: figures for trial in pack.trials} if figures else {}
        update = replace(update, ended=self._with_seconds(ended), figures=all_figures, done=True)
        self._send(update, folder if any(folder.iterdir()) else None)

    def add_seconds(self, pack: Pack, *parts: Mapping[str, float]) -> None:
        """Count phase -> seconds towards every trial of the pack."""
        for trial in pack.trials:
            seconds = self._seconds.setdefault(trial.trial_id, {})
            for part in parts:
                for phase, spent in part.items():
                    seconds[phase] = seconds.get(phase, 0.0) + spent

    def latest(self, trial_ids: Iterable[str], metric: str) -> dict[str, float]:
        """Trial id -> the latest figure, of those that have one."""
        return {trial_id: self._latest[trial_id][metric] for trial_id in trial_ids if metric in self._latest[trial_id]}

    def _training(self, pack: Pack, report: Report, tags: Mapping[str, str]) -> PackUpdate:
        records: dict[str, list[dict[str, float]]] = {}
        for trial, found in zip(pack.trials, report.records, strict=True):
            latest = self._latest.setdefault(trial.trial_id, {})
            for record in found:
                latest.update(record)
            # A pack that was halved repeats steps that have been reported.
            new = [record for record in found if record["step"] > self._reported_step.get(trial.trial_id, -1)]
            if new:
                records[trial.trial_id] = new
                self._reported_step[trial.trial_id] = int(new[-1]["step"])
        return self._update(
            pack,
            "training",
            completed=report.completed,
            steps=self.until,
            records=records,
            tags=self._new_tags(pack, tags),
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
        return {trial_id: replace(end, seconds=self._seconds.get(trial_id, {})) for trial_id, end in ended.items()}

    def _update(self, pack: Pack, phase: str, **fields: object) -> PackUpdate:
        ids = tuple(trial.trial_id for trial in pack.trials)
        return PackUpdate(pack_id=pack.pack_id, trial_ids=ids, phase=phase, **fields)  # type: ignore[arg-type]
