"""Shows a running sweep: a live table on a terminal, plain lines otherwise."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loragrid.formatting import count_of
from loragrid.trials.packing import Pack, PackQueue
from loragrid.worker.messages import PackUpdate

PLAIN_LINE_SECONDS = 10.0


@dataclass(kw_only=True)
class _PackState:
    phase: str
    steps: int
    completed: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    eval_losses: dict[str, float] = field(default_factory=dict)
    # (step, time) of the first report with steps. Rates count from here, because earlier work (compiling) is done once.
    first_report: tuple[int, float] | None = None
    seconds_left: float | None = None
    last_line: float = float("-inf")


class SweepProgress:
    """Follows the packs of a sweep; use it as a context manager."""

    def __init__(self, num_trials: int, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_trials, self.console, self._clock = num_trials, console, clock
        self._ended: set[str] = set()
        self._start = clock()
        self._packs: dict[str, _PackState] = {}
        self._names: dict[str, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> "SweepProgress":
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        else:
            self.console.print("starting Ray's workers ...")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def ended_before(self, trial_ids: Iterable[str]) -> None:
        """Count trials that ended in an earlier run of the sweep."""
        self._ended |= set(trial_ids)

    def confirming(self, num_trials: int, sentence: str, ended_before: Iterable[str] = ()) -> None:
        """The grid's trials have ended, and trials that confirm follow; some may have ended in an earlier run."""
        self.num_trials += num_trials
        self.ended_before(ended_before)
        self.console.print(f"[{_duration(self._clock() - self._start):>7}] {sentence}", markup=False, highlight=False)

    def starting(self, queue: PackQueue) -> None:
        """A queue has started."""
        first = queue.packs[0]
        self._packs[first.pack_id] = _PackState(phase="starting workers", steps=first.trials[0].training.num_steps)
        self._names |= {trial.trial_id: _describe(trial.parameters()) for trial in queue.trials}
        self._line(first.pack_id, f"{count_of(len(first.trials), 'trial')}, starting workers", at_once=True)

    def updated(self, update: PackUpdate) -> None:
        """A queue has reported an update of a pack."""
        state = self._packs.get(update.pack_id)
        if state is None and update.phase == "ended":  # a rung ended its trials after the pack was done
            state = _PackState(phase="ended", steps=update.steps)
        elif state is None:
            state = self._packs[update.pack_id] = _PackState(phase="", steps=update.steps)
            self._line(update.pack_id, count_of(len(update.trial_ids), "trial"), at_once=True)
        self._ended |= update.ended.keys()
        if update.phase not in ("measured", "ended", "waiting"):
            self._show(state, update)
        if update.done:
            self._packs.pop(update.pack_id, None)
            stopped = [end for end in update.ended.values() if end.status != "FINISHED"]
            for reason in dict.fromkeys(end.reason for end in stopped if end.status == "FAILED"):
                self.console.print(Text(f"{update.pack_id} failed:", style="bold red"), Text(reason))
            behind = f", {count_of(len(stopped), 'trial')} stopped" if stopped and update.phase == "ended" else ""
            done = "done" if update.ended else f"at its rung, step {update.completed}"
            text = f"{done}{behind} ({len(self._ended)} of {count_of(self.num_trials, 'trial')})"
            self._line(update.pack_id, text, at_once=True)

    def _show(self, state: _PackState, update: PackUpdate) -> None:
        new_phase = state.phase != update.phase
        state.phase, state.completed = update.phase, update.completed
        state.steps = update.steps or state.steps
        for trial_id, records in update.records.items():
            for record in records:
                if "train/loss" in record:
                    state.losses[trial_id] = record["train/loss"]
                if "eval/loss" in record:
                    state.eval_losses[trial_id] = record["eval/loss"]
        text = update.phase
        if update.completed:
            self._estimate(state, update)
            text = f"step {update.completed}/{state.steps}"
            if state.losses:
                text += f", train loss {min(state.losses.values()):.3f} to {max(state.losses.values()):.3f}"
            if state.seconds_left is not None:
                text += f", {_duration(state.seconds_left)} left"
        self._line(update.pack_id, text, at_once=new_phase or update.done)

    def _estimate(self, state: _PackState, update: PackUpdate) -> None:
        now = self._clock()
        if state.first_report is None:
            state.first_report = (update.completed, now)
            return
        step, since = state.first_report
        if update.completed > step:
            state.seconds_left = (now - since) / (update.completed - step) * (state.steps - update.completed)

    def ended(self, queue: PackQueue) -> None:
        """A queue's trials have ended."""
        self._ended |= {trial.trial_id for trial in queue.trials}
        for pack in queue.packs:
            self._packs.pop(pack.pack_id, None)

    def failed(self, queue: PackQueue, reason: str, ended: Iterable[str] = ()) -> None:
        """A queue has failed. `ended`: ids of its trials that have ended; other queues may train the rest."""
        self._ended |= set(ended)
        for pack in queue.packs:
            self._packs.pop(pack.pack_id, None)
        # `Text` prints the reason literally. As markup, "[/tmp/file]" in it would be read as a tag.
        self.console.print(Text(f"{queue.queue_id} failed:", style="bold red"), Text(reason))

    def halved(self, pack: Pack) -> None:
        """A pack ran out of memory; its halves are trained as two packs."""
        self._line(pack.pack_id, f"its {count_of(len(pack.trials), 'trial')} continue in two packs", at_once=True)

    def _line(self, pack_id: str, text: str, *, at_once: bool) -> None:
        if self._live is not None:
            return
        state = self._packs.get(pack_id)
        now = self._clock()
        if state is not None:
            if not at_once and now - state.last_line < PLAIN_LINE_SECONDS:
                return
            state.last_line = now
        self.console.print(f"[{_duration(now - self._start):>7}] {pack_id}: {text}", markup=False, highlight=False)

    def _render(self) -> RenderableType:
        elapsed = _duration(self._clock() - self._start)
        head = Text(f"{len(self._ended)} of {count_of(self.num_trials, 'trial')} done, {elapsed} so far", style="bold")
        if not self._packs:
            return Group(head, Text("starting Ray's workers ...", style="dim"))
        return Group(head, *(self._render_pack(pack_id, state) for pack_id, state in self._packs.items()))

    def _render_pack(self, pack_id: str, state: _PackState) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        left = "" if state.seconds_left is None else f"{_duration(state.seconds_left)} left"
        step = f"step {state.completed}/{state.steps}" if state.completed else state.phase
        line.add_row(pack_id, ProgressBar(state.steps, state.completed, width=24), step, left)
        if not state.losses and not state.eval_losses:
            return line
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 2))
        table.add_column("trial")
        table.add_column("train loss", justify="right")
        table.add_column("eval loss", justify="right")
        for trial_id in state.eval_losses | state.losses:
            table.add_row(
                self._names[trial_id],
                _number(state.losses.get(trial_id)),
                _number(state.eval_losses.get(trial_id)),
            )
        return Group(line, table)


def _describe(parameters: Mapping[str, object]) -> str:
    """A trial in a few words: method, rank, ratio, learning rate and seed."""
    shown = [("method.rank", "rank"), ("method.lr_ratio", "ratio"), ("training.lr", "lr"), ("seed", "seed")]
    words = [f"{name} {parameters[key]:g}" for key, name in shown if isinstance(parameters.get(key), int | float)]
    return " ".join([str(parameters["method.name"]), *words])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s"
