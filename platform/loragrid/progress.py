"""What a running sweep looks like in the terminal: a live table, or plain lines where there is no terminal."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loragrid.messages import PackUpdate
from loragrid.planning import Pack

PLAIN_LINE_SECONDS = 10.0


@dataclass(kw_only=True)
class _PackState:
    phase: str
    steps: int
    completed: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    eval_losses: dict[str, float] = field(default_factory=dict)
    training_since: float | None = None
    seconds_left: float | None = None
    last_line: float = float("-inf")


class SweepProgress:
    """Follows the packs of a sweep; use it as a context manager."""

    def __init__(self, num_packs: int, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_packs, self.console, self._clock = num_packs, console, clock
        self.num_ended = 0
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

    def started(self, pack: Pack) -> None:
        """A pack has been placed."""
        self._packs[pack.pack_id] = _PackState(phase="starting workers", steps=pack.trials[0].training.steps)
        self._names |= {trial.trial_id: _describe(trial.parameters()) for trial in pack.trials}
        self._line(pack.pack_id, f"{len(pack.trials)} trials, starting workers", at_once=True)

    def updated(self, pack: Pack, update: PackUpdate) -> None:
        """A pack has reported."""
        state = self._packs[pack.pack_id]
        if update.phase == "measured":
            return
        new_phase = state.phase != update.phase
        state.phase, state.completed = update.phase, update.completed
        if update.phase == "training" and state.training_since is None:
            state.training_since = self._clock()
        for trial_id, records in update.records.items():
            for record in records:
                if "train/loss" in record:
                    state.losses[trial_id] = record["train/loss"]
                if "eval/loss" in record:
                    state.eval_losses[trial_id] = record["eval/loss"]
        if update.completed and state.training_since is not None:
            per_step = (self._clock() - state.training_since) / update.completed
            state.seconds_left = per_step * (update.steps - update.completed)
        text = update.phase
        if update.completed:
            text = f"step {update.completed}/{update.steps}"
            if state.losses:
                text += f", train loss {min(state.losses.values()):.3f} to {max(state.losses.values()):.3f}"
            if state.seconds_left is not None:
                text += f", {_duration(state.seconds_left)} left"
        self._line(pack.pack_id, text, at_once=new_phase or update.finished)

    def ended(self, pack: Pack) -> None:
        """A pack's trials have ended."""
        self.num_ended += 1
        self._packs.pop(pack.pack_id, None)
        self._line(pack.pack_id, f"done ({self.num_ended} of {self.num_packs} packs)", at_once=True)

    def failed(self, pack: Pack, reason: str) -> None:
        """A pack has failed."""
        self.num_ended += 1
        self._packs.pop(pack.pack_id, None)
        # A reason is not markup: "[/tmp/file]" in it would be taken for a tag.
        self.console.print(Text(f"{pack.pack_id} failed:", style="bold red"), Text(reason))

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
        head = Text(f"{self.num_ended} of {self.num_packs} packs done, {elapsed} so far", style="bold")
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
    """A trial in a few words: its method, rank, ratio, learning rate and seed."""
    shown = [("method.rank", "rank"), ("method.lr_ratio", "ratio"), ("training.lr", "lr"), ("seed", "seed")]
    words = [f"{name} {parameters[key]:g}" for key, name in shown if isinstance(parameters.get(key), int | float)]
    return " ".join([str(parameters["method.name"]), *words])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s"
